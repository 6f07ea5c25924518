import Foundation
import MLX
import MLXNN

/// A FlashHead on the rows of a model's own output layer.
final class FlashHead {
    /// More positions than this are a prompt, of which only the last position needs logits.
    static let longest = 16

    /// Takes the tokens of each call instead of full logits.
    weak var sampler: FlashSampler?
    /// Why the kernels are not used, and all rows are: what MLX says.
    private(set) var trouble: String?

    private let plan: Plan
    private let dtype: DType
    private let kernels: [String: (dtypes: [DType], kernel: MLXFast.MLXFastKernel)]
    private let arrays: [String: MLXArray]
    private let quantization: (groupSize: Int, bits: Int, mode: QuantizationMode)?

    /// - Parameters:
    ///   - plan: the plan of the file
    ///   - arrays: the arrays of the file
    ///   - layer: the output layer, whose rows are in the order of the tokens; they move, one array
    ///     after the other
    init(_ plan: Plan, arrays: [String: MLXArray], layer: Module) throws {
        guard let tokens = arrays["token_ids"], let slots = arrays["slot_of"] else {
            throw FlashHeadError("The FlashHead's file is incomplete: export it again.")
        }
        var parameters = Dictionary(uniqueKeysWithValues: layer.parameters().flattened())
        for (name, rows) in plan.rows {
            let dtype = try DType(named: rows.dtype)
            guard let array = parameters[name], array.shape == rows.shape, array.dtype == dtype
            else {
                throw FlashHeadError(
                    "The FlashHead is for another model: \(plan.head).\(name) must have the shape "
                        + "\(rows.shape) and the dtype \(rows.dtype).")
            }
        }
        self.plan = plan
        dtype = try DType(named: plan.dtype)
        quantization = (layer as? Quantized).map { ($0.groupSize, $0.bits, $0.mode) }
        kernels = try plan.launches.mapValues { launch in
            let kernel = MLXFast.metalKernel(
                name: launch.name, inputNames: launch.inputNames,
                outputNames: launch.outputNames, source: launch.source, header: launch.header)
            return (try launch.outputDTypes.map { try DType(named: $0) }, kernel)
        }
        let order = minimum(tokens.flattened().asType(.int32), slots.size - 1)
        var all = arrays
        for name in plan.rows.keys {
            let rows = parameters.removeValue(forKey: name)![order]
            eval(rows)
            all["rows_\(name)"] = rows
            layer.update(parameters: .unflattened([(name, MLXArray.zeros([1]))]))
            Memory.clearCache()  // of the rows in their old order
        }
        eval(Array(all.values))
        self.arrays = all
        do {
            try withError {
                let hidden = MLXArray.zeros([1, hiddenSize], dtype: dtype)
                let settings = FlashSettings().arrays(step: 0)
                eval(run(plan.logits, hidden), run(plan.tokens, hidden, settings))
            }
        } catch {
            trouble = error.localizedDescription
        }
    }

    /// Logits: hidden states (B, L, D) → (B, L, V); of a prompt (B, 1, V), for the last position.
    ///
    /// With a sampler (B, L, 1): it has the tokens.
    func callAsFunction(_ hidden: MLXArray) -> MLXArray {
        let isPrompt = hidden.dim(1) > Self.longest
        let hidden = isPrompt ? hidden[0..., -1, 0...].expandedDimensions(axis: 1) : hidden
        let shape = [hidden.dim(0), hidden.dim(1)]
        let rows = hidden.reshaped(shape[0] * shape[1], hidden.dim(2)).asType(dtype)
        if trouble == nil, let sampler {
            let tokens = run(plan.tokens, rows, sampler.next(rows.dim(0)))
            sampler.latest = tokens.reshaped(shape)
            return MLXArray.zeros(shape + [1])
        }
        let isDense = trouble != nil || rows.dim(0) > plan.limit
        return (isDense ? dense(rows) : run(plan.logits, rows)).reshaped(shape + [-1])
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

    private var hiddenSize: Int { plan.launches[plan.logits[0]]!.argument("D") }

    /// What the last of the launches gives: hidden states (R, D) → (R, V) or (R).
    private func run(
        _ names: [String], _ hidden: MLXArray, _ settings: [String: MLXArray] = [:]
    ) -> MLXArray {
        let positions = hidden.dim(0)
        var arrays = self.arrays.merging(settings) { $1 }
        arrays["hidden"] = hidden
        for name in names {
            let launch = plan.launches[name]!
            let (dtypes, kernel) = kernels[name]!
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
        return arrays[plan.launches[names.last!]!.outputNames[0]]!
    }

    /// Logits from all rows: hidden states (R, D) → (R, V).
    private func dense(_ hidden: MLXArray) -> MLXArray {
        let weight = arrays["rows_weight"]!
        var logits: MLXArray
        if let quantization {
            logits = quantizedMM(
                hidden, weight, scales: arrays["rows_scales"]!, biases: arrays["rows_biases"],
                groupSize: quantization.groupSize, bits: quantization.bits,
                mode: quantization.mode)
        } else {
            logits = matmul(hidden, weight.T)
        }
        if let bias = arrays["rows_bias"] {
            logits = logits + bias
        }
        return take(logits, arrays["slot_of"]!, axis: -1)
    }
}
