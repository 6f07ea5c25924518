// Installs a FlashHead in a layer and writes what both give: flash-check FOLDER.
// tests/head/test_swift.py writes the folder's files and compares.
import Foundation
import MLX
import MLXNN

struct Case: Decodable {
    struct Quantization: Decodable {
        let groupSize: Int
        let bits: Int
        let mode: QuantizationMode
    }

    struct Settings: Decodable {
        let temperature: Double
        let topP: Double
        let minP: Double
        let topK: Int
        let seed: UInt64
    }

    let isTied: Bool
    let shape: [Int]  // of the rows
    let quantization: Quantization?
    let settings: [Settings]
}

final class Model: Module {
    @ModuleInfo(key: "embed_tokens") var embedding: Embedding?
    @ModuleInfo(key: "lm_head") var head: Linear?

    init(_ test: Case, _ parameters: [String: MLXArray]) {
        super.init()
        let zeros = MLXArray.zeros(test.shape)
        let bias = parameters["bias"]
        switch (test.isTied, test.quantization) {
        case (true, nil): embedding = Embedding(weight: zeros)
        case (false, nil): head = Linear(weight: zeros, bias: bias)
        case (true, let given?):
            embedding = QuantizedEmbedding(
                weight: zeros, groupSize: given.groupSize, bits: given.bits, mode: given.mode)
        case (false, let given?):
            head = QuantizedLinear(
                weight: zeros, bias: bias, groupSize: given.groupSize, bits: given.bits,
                mode: given.mode)
        }
        (embedding ?? head)!.update(parameters: .unflattened(Array(parameters)))
    }

    func callAsFunction(_ hidden: MLXArray) -> MLXArray {
        embedding?.asLinear(hidden) ?? head!(hidden)
    }
}

func check(_ folder: URL) throws {
    func file(_ name: String) -> URL { folder.appendingPathComponent(name) }

    let test = try JSONDecoder().decode(Case.self, from: Data(contentsOf: file("case.json")))
    let inputs = try loadArrays(url: file("inputs.safetensors"))
    let model = Model(test, try loadArrays(url: file("layer.safetensors")))
    let hidden = inputs["hidden"]!  // (1, L, D)
    var results = ["dense": model(hidden)]
    if let embedding = model.embedding {
        results["dense_rows"] = embedding(inputs["tokens"]!)
    }
    eval(Array(results.values))

    var said = ["trouble": try installFlashHead(from: file("head.safetensors"), in: model) ?? ""]
    for length in [1, 3, 5, hidden.dim(1)] {  // alone, scored, dense, a prompt
        results["logits_\(length)"] = model(hidden[0..., ..<length])
    }
    if let embedding = model.embedding {
        results["rows"] = embedding(inputs["tokens"]!)
    }
    for (i, given) in test.settings.enumerated() {
        let settings = FlashSettings(
            temperature: given.temperature, topP: given.topP, minP: given.minP, topK: given.topK,
            seed: given.seed)
        for (name, array) in settings.arrays(step: 0, positions: 4) {
            results["\(name)_\(i)"] = array
        }
        do {
            let sampler = try FlashSampler(settings, in: model)
            for step in 0 ..< 4 {  // a prompt of three positions, then one by one
                let logits = model(step == 0 ? hidden[0..., ..<3] : hidden[0..., step + 2 ..< step + 3])
                results["token_\(i)_\(step)"] = sampler.sample(logits: logits)
            }
        } catch {
            said["sampler"] = error.localizedDescription
        }
    }
    results["logits_after"] = model(hidden[0..., ..<1])  // the samplers are gone
    try save(arrays: results, metadata: said, url: file("results.safetensors"))
}

try Device.withDefaultDevice(.cpu) {
    try check(URL(fileURLWithPath: CommandLine.arguments[1]))
}
