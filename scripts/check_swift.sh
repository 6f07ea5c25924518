#!/usr/bin/env bash
# Checks the types of metal/swift on Linux, with Swift 6.0 or later:
#   scripts/check_swift.sh FOLDER
# FOLDER holds checkouts of the versions in metal/swift/Package.swift, mlx-swift and mlx-swift-lm, and
# of swift-numerics 1.1.1. Their sources are compiled as modules, without the bodies of functions.
# What Apple's frameworks and swift-transformers give is declared below.
set -euo pipefail
package="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/metal/swift"
sources="$(cd "${1:?usage: scripts/check_swift.sh FOLDER}" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mlx="$sources/mlx-swift/Source" lm="$work/Libraries" numerics="$sources/swift-numerics/Sources"

flags=(-swift-version 5 -parse-as-library -I "$work" -module-cache-path "$work/cache")
for map in "$mlx/Cmlx/include" "$numerics/_NumericsShims/include"; do
  flags+=(-I "$map" -Xcc "-fmodule-map-file=$map/module.modulemap")
done

# module NAME FILE …: what others may import.
module() {
  swiftc -emit-module -module-name "$1" -emit-module-path "$work/$1.swiftmodule" "${flags[@]}" \
    -package-name "mlx-swift-lm" -Xfrontend -experimental-skip-all-function-bodies \
    -suppress-warnings "${@:2}"
  echo "module $1"
}

# declared NAME: a module of what is on standard input.
declared() {
  cat > "$work/$1.swift"
  module "$1" "$work/$1.swift"
}

for name in RealModule ComplexModule Numerics; do
  module "$name" "$numerics/$name"/*.swift
done
module MLX $(ls "$mlx"/MLX/*.swift | grep -v -e 'GPU+' -e 'MLXArray+Metal')
module MLXNN "$mlx"/MLXNN/*.swift
module MLXOptimizers "$mlx"/MLXOptimizers/*.swift

declared AVFoundation << 'END'
@_exported import Foundation
public struct CMTime: Sendable {}
open class AVAsset: @unchecked Sendable { public init(url: URL) {} }
public typealias AudioFormatID = UInt32
public let kAudioFormatLinearPCM: AudioFormatID = 0
END
declared CoreImage <<< 'open class CIImage: @unchecked Sendable {}'
declared CoreGraphics <<< '@_exported import Foundation'
declared os <<< 'public struct Logger: Sendable { public init(subsystem: String, category: String) {} }'

# A comma after the last parameter needs Swift 6.1.
cp -r "$sources/mlx-swift-lm/Libraries" "$lm"
find "$lm" -name '*.swift' -exec sed -i.bak -z 's/,\n\( *) ->\)/\n\1/g' {} +
module MLXLMCommon $(find "$lm/MLXLMCommon" -name '*.swift')
module MLXLLM $(find "$lm/MLXLLM" -name '*.swift')

module FlashHead "$package"/Sources/FlashHead/*.swift
swiftc -typecheck -module-name FlashHead "${flags[@]}" "$package"/Sources/FlashHead/*.swift
echo "FlashHead: types are right"

# A function stands for the macro, which needs swift-syntax.
declared Tokenizers < /dev/null
declared MLXHuggingFace << 'END'
import MLXLMCommon
public func huggingFaceTokenizerLoader() -> any TokenizerLoader { fatalError() }
END
sed 's/#huggingFaceTokenizerLoader/huggingFaceTokenizerLoader/' \
  "$package/Sources/FlashChat/main.swift" > "$work/main.swift"
swiftc -typecheck -module-name FlashChat "${flags[@]/-parse-as-library/-suppress-warnings}" \
  "$work/main.swift"
echo "FlashChat: types are right"
