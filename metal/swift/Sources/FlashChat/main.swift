import FlashHead
import Foundation
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let arguments = CommandLine.arguments.dropFirst().map { URL(fileURLWithPath: $0) }
guard arguments.count == 2 else {
    print("usage: flash-chat MODEL_FOLDER HEAD.safetensors")
    exit(2)
}
let model = try await LLMModelFactory.shared.load(
    from: arguments[0], using: #huggingFaceTokenizerLoader())
if let trouble = try installFlashHead(from: arguments[1], in: model.model) {
    print("FlashHead's kernels do not run on this device, so all rows are read: \(trouble)")
}
let session = ChatSession(model)
while let question = readLine() {
    for try await piece in session.streamResponse(to: question) {
        print(piece, terminator: "")
        fflush(stdout)
    }
    print()
}
