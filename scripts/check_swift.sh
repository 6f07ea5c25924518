#!/usr/bin/env bash
# Checks the types of metal/swift on Linux and runs it there, with Swift 6.0 or later:
#   scripts/check_swift.sh FOLDER [PYTHON]
# FOLDER holds checkouts of the versions in metal/swift/Package.swift, mlx-swift with its submodules and
# mlx-swift-lm, and of swift-numerics 1.1.1. What is compiled of them stays in FOLDER/built. PYTHON
# has this package and its tests' requirements.
#
# MLX itself comes from PyPI, for the CPU. Of mlx-swift-lm the bodies of functions are not compiled.
# What Apple's frameworks and swift-transformers give is declared below.
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
package="$checkout/metal/swift"
sources="$(cd "${1:?usage: scripts/check_swift.sh FOLDER [PYTHON]}" && pwd)"
python="${2:-python3}"
built="$sources/built"
mkdir -p "$built"
mlx="$sources/mlx-swift/Source" numerics="$sources/swift-numerics/Sources"

flags=(-swift-version 5 -parse-as-library -I "$built" -module-cache-path "$built/cache")
for map in "$mlx/Cmlx/include" "$numerics/_NumericsShims/include"; do
  flags+=(-I "$map" -Xcc "-fmodule-map-file=$map/module.modulemap")
done

# library NAME FILE …: a module that runs.
library() {
  [ -e "$built/lib$1.a" ] || swiftc -wmo -static -emit-library -o "$built/lib$1.a" -emit-module \
    -module-name "$1" -emit-module-path "$built/$1.swiftmodule" -package-name mlx-swift \
    "${flags[@]}" -suppress-warnings "${@:2}"
  echo "library $1"
}

# module NAME FILE …: what others may import.
module() {
  [ -e "$built/$1.swiftmodule" ] || swiftc -emit-module -module-name "$1" \
    -emit-module-path "$built/$1.swiftmodule" "${flags[@]}" -package-name mlx-swift-lm \
    -Xfrontend -experimental-skip-all-function-bodies -suppress-warnings "${@:2}"
  echo "module $1"
}

# declared NAME: a module of what is on standard input.
declared() {
  cat > "$built/$1.swift"
  module "$1" "$built/$1.swift"
}

for name in RealModule ComplexModule Numerics; do
  library "$name" "$numerics/$name"/*.swift
done
library MLX $(ls "$mlx"/MLX/*.swift | grep -v -e 'GPU+' -e 'MLXArray+Metal' -e 'MLXFastKernel') \
  "$package/Linux/MLXFastKernel.swift"
library MLXNN "$mlx"/MLXNN/*.swift
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
if [ ! -e "$built/Libraries" ]; then
  cp -r "$sources/mlx-swift-lm/Libraries" "$built"
  find "$built/Libraries" -name '*.swift' -exec sed -i -z 's/,\n\( *) ->\)/\n\1/g' {} +
fi
module MLXLMCommon $(find "$built/Libraries/MLXLMCommon" -name '*.swift')
module MLXLLM $(find "$built/Libraries/MLXLLM" -name '*.swift')

rm -f "$built/FlashHead.swiftmodule"
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
  "$package/Sources/FlashChat/main.swift" > "$built/main.swift"
swiftc -typecheck -module-name FlashChat "${flags[@]/-parse-as-library/-suppress-warnings}" \
  "$built/main.swift"
echo "FlashChat: types are right"

if [ ! -e "$built/mlx-c/libmlxc.a" ]; then
  "$python" -m pip install -q --no-deps --target "$built/python" mlx-cpu==0.31.1
  cmake -S "$mlx/Cmlx/mlx-c" -B "$built/mlx-c" -DMLX_C_USE_SYSTEM_MLX=ON \
    -DMLX_C_BUILD_EXAMPLES=OFF -DCMAKE_BUILD_TYPE=Release \
    -DMLX_DIR="$built/python/mlx/share/cmake/MLX" > "$built/cmake.log"
  cmake --build "$built/mlx-c" --parallel > "$built/cmake.log"
fi
libraries="$built/python/mlx/lib"
swiftc -Onone -module-name FlashCheck "${flags[@]/-parse-as-library/}" -o "$built/flash-check" \
  "$package"/Sources/FlashHead/*.swift "$package/Linux/main.swift" -L "$built" -lMLXNN -lMLX \
  -lNumerics -lComplexModule -lRealModule -L "$built/mlx-c" -lmlxc -L "$libraries" -lmlx -lstdc++ \
  -Xlinker -rpath -Xlinker "$libraries"
cd "$checkout"
MLX_FLASHHEAD_SWIFT="$built/flash-check" "$python" -m pytest -q tests/head/test_swift.py
