import Foundation
import MLX
import MLXNN

/// How tokens are drawn from the scored rows.
public struct FlashSettings {
    public var temperature: Double  // 0: the likeliest token
    public var topP: Double  // 1: all
    public var minP: Double  // 0: all
    public var topK: Int  // 0: all
    public var seed: UInt64

    public init(
        temperature: Double = 0, topP: Double = 1, minP: Double = 0, topK: Int = 0,
        seed: UInt64 = 0
    ) {
        self.temperature = temperature
        self.topP = topP
        self.minP = minP
        self.topK = topK
        self.seed = seed
    }

    /// The kernel's arrays for a number of positions; `step` is the number of those before. They have
    /// 8 rows or more, since MLX compiles another kernel for an array of fewer than 8 elements.
    func arrays(step: UInt64, positions: Int = 1) -> [String: MLXArray] {
        let inverse = temperature > 0 ? 1 / temperature : 0
        let floats = [inverse, topP, minP > 0 ? log(minP) : -1e30]
        let rows = max(positions, 8)
        let keys = (0 ..< UInt64(rows)).flatMap { key(step &+ $0) }
        return [
            "settings": tiled(MLXArray(floats.map(Float.init), [1, 3]), repetitions: [rows, 1]),
            "top_k": MLXArray.full([rows], values: MLXArray(UInt32(topK))),
            "keys": MLXArray(keys, [rows, 2]),
        ]
    }

    /// The key of a position, as `position_key` in `head/draws/noise.py` makes it.
    private func key(_ position: UInt64) -> [UInt32] {
        let word = mixed(mixed(seed) &+ position)
        return [UInt32(word >> 32), UInt32(truncatingIfNeeded: word)]
    }
}

/// SplitMix64.
private func mixed(_ value: UInt64) -> UInt64 {
    var value = value &+ 0x9E37_79B9_7F4A_7C15
    value = (value ^ (value >> 30)) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ (value >> 27)) &* 0x94D0_49BB_1331_11EB
    return value ^ (value >> 31)
}

/// Takes tokens from a FlashHead without full logits, drawn or greedy, from the scored rows alone.
///
/// As long as it lives, the model's calls return logits that say nothing, and `sample` gives the
/// tokens. In an app it is a sampler of mlx-swift-lm's `TokenIterator` by
/// `extension FlashSampler: @retroactive LogitSampler {}`. A processor of logits has no effect.
public final class FlashSampler {
    var latest: MLXArray?
    private let settings: FlashSettings
    private var step: UInt64 = 0

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
        defer { step = step &+ UInt64(positions) }
        return settings.arrays(step: step, positions: positions)
    }
}
