import Foundation
import MLX
import MLXNN

/// How tokens are drawn from the scored rows.
public struct FlashSettings {
    public var temperature: Float  // 0: the likeliest token
    public var topP: Float  // 1: all
    public var minP: Float  // 0: all
    public var topK: Int  // 0: all
    public var seed: UInt32

    public init(
        temperature: Float = 0, topP: Float = 1, minP: Float = 0, topK: Int = 0, seed: UInt32 = 0
    ) {
        self.temperature = temperature
        self.topP = topP
        self.minP = minP
        self.topK = topK
        self.seed = seed
    }

    /// The kernel's arrays for a number of positions; `step` is the number of those before.
    func arrays(step: UInt32, positions: Int = 1) -> [String: MLXArray] {
        let inverse = temperature > 0 ? 1 / temperature : 0
        let floats = [inverse, topP, minP > 0 ? log(minP) : -1e30]
        let keys = (0 ..< UInt32(positions)).flatMap { [seed, step &+ $0] }
        return [
            "settings": tiled(MLXArray(floats, [1, 3]), repetitions: [positions, 1]),
            "top_k": MLXArray.full([positions], values: MLXArray(UInt32(topK))),
            "keys": MLXArray(keys, [positions, 2]),
        ]
    }
}

/// Takes tokens from a FlashHead without full logits, drawn or greedy, from the scored rows alone.
///
/// As long as it lives, the model's calls return logits that say nothing, and `sample` gives the
/// tokens. In an app it is a sampler of mlx-swift-lm's `TokenIterator` by
/// `extension FlashSampler: @retroactive LogitSampler {}`. A processor of logits has no effect.
public final class FlashSampler {
    var latest: MLXArray?
    private let settings: FlashSettings
    private var step: UInt32 = 0

    /// - Parameters:
    ///   - settings: how tokens are drawn
    ///   - model: a model with a FlashHead
    public init(_ settings: FlashSettings = FlashSettings(), in model: Module) throws {
        let heads = model.namedModules().compactMap { ($0.1 as? FlashLayer)?.head }
        guard let head = heads.first else {
            throw FlashHeadError("The model has no FlashHead: call installFlashHead first.")
        }
        if let trouble = head.trouble {
            throw FlashHeadError("FlashHead's kernels do not run on this device: \(trouble)")
        }
        self.settings = settings
        head.sampler = self
    }

    /// The tokens of the latest call: logits of any values → (B), those of the last position.
    public func sample(logits: MLXArray) -> MLXArray {
        latest![0..., -1]
    }

    func next(_ positions: Int) -> [String: MLXArray] {
        defer { step = step &+ UInt32(positions) }
        return settings.arrays(step: step, positions: positions)
    }
}
