import Foundation
import MLX

/// The kernels of a FlashHead, as `mlx_flashhead.export` writes them; see `head/plan.py`.
struct Plan: Decodable {
    /// Shape and dtype of an array of the model's output layer.
    struct Rows: Decodable {
        let shape: [Int]
        let dtype: String
    }

    let head: String  // path of the model's output layer
    let dtype: String  // of the hidden states
    let hiddenSize: Int
    let rows: [String: Rows]  // by their names in that layer
    let limit: Int  // more positions at once read more rows than the dense layer
    let logits: [String]  // the launches that give full logits, in their order
    let tokens: [String]  // those that give tokens
    let launches: [String: Launch]
}

/// A kernel and its launch for one position.
struct Launch: Decodable {
    struct Argument: Decodable {
        let name: String
        let value: Value
    }

    enum Value: Decodable {
        case int(Int)
        case bool(Bool)
        case dtype(DType)

        init(from decoder: Decoder) throws {
            let value = try decoder.singleValueContainer()
            if let bool = try? value.decode(Bool.self) {
                self = .bool(bool)
            } else if let int = try? value.decode(Int.self) {
                self = .int(int)
            } else {
                self = .dtype(try DType(named: value.decode(String.self)))
            }
        }

        var argument: any KernelTemplateArg {
            switch self {
            case .int(let value): value
            case .bool(let value): value
            case .dtype(let value): value
            }
        }
    }

    let name: String
    let inputNames: [String]
    let outputNames: [String]
    let source: String
    let header: String
    let arrays: [String]  // the inputs, by their names in FlashHead.arrays
    let template: [Argument]
    let grid: [Int]
    let threadGroup: [Int]
    let outputShapes: [[Int]]
    let outputDTypes: [String]
}

extension DType {
    /// The dtype of a name such as "bfloat16".
    init(named name: String) throws {
        guard let found = DType.allCases.first(where: { "\($0)" == name }) else {
            throw FlashHeadError("The FlashHead's file has an unknown dtype, \(name).")
        }
        self = found
    }
}

public struct FlashHeadError: LocalizedError {
    public let errorDescription: String?

    init(_ description: String) {
        errorDescription = description
    }
}
