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
    private let dtypes: [String: [DType]]  // of each launch's results
    private var kernels: [String: MLXFast.MLXFastKernel] = [:]
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
        dtypes = try plan.launches.mapValues { try $0.outputDTypes.map { try DType(named: $0) } }
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
            try withError(tryKernels)
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
        if let sampler, let tokens = run(plan.tokens, rows, sampler.next(rows.dim(0))) {
            sampler.latest = tokens.reshaped(shape)
            return MLXArray.zeros(shape + [1])
        }
        let scored = rows.dim(0) > plan.limit ? nil : run(plan.logits, rows)
        return (scored ?? dense(rows)).reshaped(shape + [-1])
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

    /// Runs each kernel once, within `withError`.
    private func tryKernels() {
        kernels = plan.launches.mapValues {
            MLXFast.metalKernel(
                name: $0.name, inputNames: $0.inputNames, outputNames: $0.outputNames,
                source: $0.source, header: $0.header)
        }
        let hidden = MLXArray.zeros([1, plan.hiddenSize], dtype: dtype)
        let results = [
            run(plan.logits, hidden), run(plan.tokens, hidden, FlashSettings().arrays(step: 0)),
        ]
        eval(results.compactMap { $0 })
    }

    /// What the last of the launches gives: hidden states (R, D) → (R, V) or (R).
    ///
    /// Nil where MLX refuses a kernel.
    private func run(
        _ names: [String], _ hidden: MLXArray, _ settings: [String: MLXArray] = [:]
    ) -> MLXArray? {
        if trouble != nil { return nil }
        let positions = hidden.dim(0)
        var arrays = self.arrays.merging(settings) { $1 }
        arrays["hidden"] = hidden
        for name in names {
            let launch = plan.launches[name]!
            let results = kernels[name]!(
                launch.arrays.map { arrays[$0]! },
                template: launch.template.map { ($0.name, $0.value.argument) },
                grid: (launch.grid[0], launch.grid[1] * positions, launch.grid[2]),
                threadGroup: (launch.threadGroup[0], launch.threadGroup[1], launch.threadGroup[2]),
                outputShapes: launch.outputShapes.map { [$0[0] * positions] + $0.dropFirst() },
                outputDTypes: dtypes[name]!)
            if results.count < launch.outputNames.count { return nil }
            for (name, result) in zip(launch.outputNames, results) {
                arrays[name] = result
            }
        }
        return names.last.flatMap { arrays[plan.launches[$0]!.outputNames[0]] }
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
