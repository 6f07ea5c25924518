import Foundation
import MLX
import MLXNN

/// A FlashHead on the rows of a model's own output layer.
final class FlashHead {
    /// More positions than this are a prompt, of which only the last position needs logits.
    static let longest = 16

    private let dtype: DType
    private let kernels: [(launch: Launch, dtypes: [DType], kernel: MLXFast.MLXFastKernel)]
    private let arrays: [String: MLXArray]
    private let quantization: (groupSize: Int, bits: Int, mode: QuantizationMode)?

    /// - Parameters:
    ///   - plan: the plan of the file
    ///   - arrays: the arrays of the file
    ///   - layer: the output layer, whose rows are in the order of the tokens
    init(_ plan: Plan, arrays: [String: MLXArray], layer: Module) throws {
        guard let tokens = arrays["token_ids"], let slots = arrays["slot_of"] else {
            throw FlashHeadError("The FlashHead's file is incomplete: export it again.")
        }
        let parameters = Dictionary(uniqueKeysWithValues: layer.parameters().flattened())
        let order = minimum(tokens.flattened().asType(.int32), slots.size - 1)
        var all = arrays
        for (name, rows) in plan.rows {
            let dtype = try DType(named: rows.dtype)
            guard let array = parameters[name], array.shape == rows.shape, array.dtype == dtype
            else {
                throw FlashHeadError(
                    "The FlashHead is for another model: \(plan.head).\(name) must have the shape "
                        + "\(rows.shape) and the dtype \(rows.dtype).")
            }
            all["rows_\(name)"] = array[order]
        }
        eval(Array(all.values))
        self.arrays = all
        dtype = try DType(named: plan.dtype)
        quantization = (layer as? Quantized).map { ($0.groupSize, $0.bits, $0.mode) }
        kernels = try plan.launches.map { launch in
            let kernel = MLXFast.metalKernel(
                name: launch.name, inputNames: launch.inputNames,
                outputNames: launch.outputNames, source: launch.source, header: launch.header)
            return (launch, try launch.outputDTypes.map { try DType(named: $0) }, kernel)
        }
    }

    /// Logits: hidden states (B, L, D) → (B, L, V); of a prompt (B, 1, V), for the last position.
    func callAsFunction(_ hidden: MLXArray) -> MLXArray {
        let isPrompt = hidden.dim(1) > Self.longest
        let hidden = isPrompt ? hidden[0..., -1, 0...].expandedDimensions(axis: 1) : hidden
        let positions = hidden.dim(0) * hidden.dim(1)
        var arrays = self.arrays
        arrays["hidden"] = hidden.reshaped(positions, hidden.dim(2)).asType(dtype)
        for (launch, dtypes, kernel) in kernels {
            let results = kernel(
                launch.arrays.map { arrays[$0]! },
                template: launch.template.map { ($0.name, $0.value.argument) },
                grid: (launch.grid[0], launch.grid[1] * positions, launch.grid[2]),
                threadGroup: (launch.threadGroup[0], launch.threadGroup[1], launch.threadGroup[2]),
                outputShapes: launch.outputShapes.map { [$0[0] * positions] + $0.dropFirst() },
                outputDTypes: dtypes)
            for (name, result) in zip(launch.outputNames, results) {
                arrays[name] = result
            }
        }
        return arrays["expanded"]!.reshaped(hidden.dim(0), hidden.dim(1), -1)
    }

    /// Rows of tokens: ids of any shape → (…, D), for an embedding that is also the output layer.
    func rows(of tokens: MLXArray) -> MLXArray {
        let slots = arrays["slot_of"]![tokens.flattened()]
        var rows = arrays["rows_weight"]![slots]
        if let quantization {
            rows = dequantized(
                rows, scales: arrays["rows_scales"]![slots],
                biases: arrays["rows_biases"].map { $0[slots] },
                groupSize: quantization.groupSize, bits: quantization.bits,
                mode: quantization.mode)
        }
        return rows.reshaped(tokens.shape + [-1])
    }
}
