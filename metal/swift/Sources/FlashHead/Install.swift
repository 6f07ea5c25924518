import Foundation
import MLX
import MLXNN

/// A layer in the place of a model's own.
protocol FlashLayer {
    var head: FlashHead { get }
}

/// An output layer of its own.
private final class FlashLinear: Linear, FlashLayer {
    let head: FlashHead

    init(_ head: FlashHead) {
        self.head = head
        super.init(weight: MLXArray.zeros([1, 1]))  // the rows are in the FlashHead
    }

    override func callAsFunction(_ x: MLXArray) -> MLXArray { head(x) }
}

/// An embedding that is also the output layer.
private final class FlashEmbedding: Embedding, FlashLayer {
    let head: FlashHead

    init(_ head: FlashHead) {
        self.head = head
        super.init(weight: MLXArray.zeros([1, 1]))
    }

    override func callAsFunction(_ x: MLXArray) -> MLXArray { head.rows(of: x) }
    override func asLinear(_ x: MLXArray) -> MLXArray { head(x) }
}

/// Puts a FlashHead in the place of a model's output layer.
///
/// The layer's rows move into the FlashHead, one array after the other: for a moment this needs room for
/// its weight a second time. Each kernel runs once. If one fails, all rows are read instead, as in the
/// layer before.
///
/// - Parameters:
///   - file: what `mlx_flashhead.export` has written for this model
///   - model: a model that mlx-swift-lm has loaded
/// - Returns: what MLX says of a kernel that does not run on this device, or nil
@discardableResult
public func installFlashHead(from file: URL, in model: Module) throws -> String? {
    let (arrays, metadata) = try loadArraysAndMetadata(url: file)
    guard let text = metadata["flash_head"] else {
        throw FlashHeadError("\(file.lastPathComponent) was not written by mlx_flashhead.export.")
    }
    let plan = try JSONDecoder().decode(Plan.self, from: Data(text.utf8))
    let layers = try replacements(in: model, plan, arrays)
    try model.update(modules: .unflattened(layers), verify: .all)
    return (layers[0].1 as? FlashLayer)?.head.trouble
}

/// The new layers, by their paths.
private func replacements(
    in model: Module, _ plan: Plan, _ arrays: [String: MLXArray]
) throws -> [(String, Module)] {
    let layers = model.namedModules()
    let replaceable: [Module.Type] = [
        Linear.self, QuantizedLinear.self, Embedding.self, QuantizedEmbedding.self,
    ]
    // Swift's model may be a part of Python's, or hold it as a part.
    let alike = layers.filter { path, _ in
        path == plan.head || path.hasSuffix("." + plan.head) || plan.head.hasSuffix("." + path)
    }
    let found = alike.min { abs($0.0.count - plan.head.count) < abs($1.0.count - plan.head.count) }
    guard let (path, layer) = found, replaceable.contains(where: { $0 == type(of: layer) }) else {
        throw FlashHeadError("The model has no layer \(plan.head) that a FlashHead can replace.")
    }
    let head = try FlashHead(plan, arrays: arrays, layer: layer)
    guard layer is Embedding else {
        return [(path, FlashLinear(head))]
    }
    // In Swift some tied models have an output layer too, with the arrays of the embedding.
    let twin = layers.first { path, _ in path == "lm_head" || path.hasSuffix(".lm_head") }
    let others = twin.map { [($0.0, FlashLinear(head) as Module)] } ?? []
    return [(path, FlashEmbedding(head))] + others
}
