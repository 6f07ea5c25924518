// swift-tools-version: 6.1
import PackageDescription

let package = Package(
    name: "FlashHead",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "FlashHead", targets: ["FlashHead"]),
        .executable(name: "flash-chat", targets: ["FlashChat"]),
    ],
    dependencies: [
        .package(url: "https://github.com/ml-explore/mlx-swift", exact: "0.31.6"),
        .package(url: "https://github.com/ml-explore/mlx-swift-lm", exact: "3.31.4"),
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.0"),
    ],
    targets: [
        .target(
            name: "FlashHead",
            dependencies: [
                .product(name: "MLX", package: "mlx-swift"),
                .product(name: "MLXNN", package: "mlx-swift"),
            ]),
        .executableTarget(
            name: "FlashChat",
            dependencies: [
                "FlashHead",
                .product(name: "MLXLLM", package: "mlx-swift-lm"),
                .product(name: "MLXLMCommon", package: "mlx-swift-lm"),
                .product(name: "MLXHuggingFace", package: "mlx-swift-lm"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ]),
    ],
    swiftLanguageModes: [.v5]
)
