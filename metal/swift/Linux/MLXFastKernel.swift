import Cmlx
import Foundation

/// In the place of mlx-swift's file of that name: on Linux MLX has no kernels.
///
/// A launch is written to a file, and its name to standard output. Whoever reads that runs the kernel,
/// writes the results to another file, and answers with its name. Where `FLASH_KERNELS` is "refused",
/// MLX refuses the kernels with an error of its own, as on a device without Metal.
public protocol KernelTemplateArg {}

extension Bool: KernelTemplateArg {}
extension Int: KernelTemplateArg {}
extension DType: KernelTemplateArg {}

extension MLXFast {
    public final class MLXFastKernel {
        private let texts: [String: Any]
        private let outputNames: [String]
        private let isRefused = ProcessInfo.processInfo.environment["FLASH_KERNELS"] == "refused"

        init(
            _ name: String, _ inputNames: [String], _ outputNames: [String], _ source: String,
            _ header: String
        ) {
            self.outputNames = outputNames
            texts = [
                "name": name, "input_names": inputNames, "output_names": outputNames,
                "source": source, "header": header,
            ]
            if isRefused {
                let names = mlx_vector_string_new()
                mlx_vector_string_append_value(names, "out")
                _ = mlx_fast_metal_kernel_new(name, names, names, source, header, true, false)
            }
        }

        public func callAsFunction(
            _ inputs: [MLXArray], template: [(String, any KernelTemplateArg)],
            grid: (Int, Int, Int), threadGroup: (Int, Int, Int), outputShapes: [[Int]],
            outputDTypes: [DType]
        ) -> [MLXArray] {
            if isRefused { return [] }
            let call: [String: Any] = [
                "template": template.map { [$0, $1 is DType ? "\($1)" : $1] as [Any] },
                "grid": [grid.0, grid.1, grid.2],
                "threadgroup": [threadGroup.0, threadGroup.1, threadGroup.2],
                "output_shapes": outputShapes,
                "output_dtypes": outputDTypes.map { "\($0)" },
            ]
            let json = try! JSONSerialization.data(withJSONObject: ["kernel": texts, "call": call])
            let file = FileManager.default.temporaryDirectory
                .appendingPathComponent("\(UUID()).safetensors")
            let arrays = inputs.enumerated().map { ("\($0)", $1) }
            try! save(
                arrays: Dictionary(uniqueKeysWithValues: arrays),
                metadata: ["launch": String(decoding: json, as: UTF8.self)], url: file)
            print("launch \(file.path)")
            fflush(stdout)
            let results = try! loadArrays(url: URL(fileURLWithPath: readLine()!))
            return outputNames.map { results[$0]! }
        }
    }

    public static func metalKernel(
        name: String, inputNames: [String], outputNames: [String], source: String, header: String
    ) -> MLXFastKernel {
        MLXFastKernel(name, inputNames, outputNames, source, header)
    }
}
