"""Compiles kernels and the runtime with the clang of the ``ziglang`` package, once each."""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from .frontend import KernelFault, check_syntax_tree, translate

FOLDER = Path(__file__).parent
LOCAL_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
TARGET = f"{platform.machine().replace('arm64', 'aarch64')}-unknown-linux-gnu"

# What MLX puts before a kernel: metal::utils(), as far as kernels may rely on it.
MLX_PRELUDE = """\
#define METAL_EMULATOR_MLX 1
#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""

# Optimised, but not vectorised: an access stays an access of the kernel's own width.
KERNEL_FLAGS = [
    *("-x", "clcpp", "-cl-std=clc++2021"),
    # No double: a literal 1.0 is a float, as in Metal. A generic address space exists only for the
    # `this` of structs; the syntax tree is searched for any other use of it.
    "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space",
    *("-mrelocation-model", "pic", "-pic-level", "2"),
    *("-ffloat16-excess-precision=none", "-fbfloat16-excess-precision=none"),
    *("-Wno-everything", "-fno-caret-diagnostics", "-fmessage-length=0"),
    *("-I", str(FOLDER / "shim"), "-include", "emulator/language.h"),
    # The same barrier or simd operation in two branches stays two operations.
    *("-mllvm", "-hoist-common-insts=false", "-mllvm", "-sink-common-insts=false"),
    *("-mllvm", "-enable-tail-merge=false"),
]
# Products and sums may become one operation, as Apple's compiler may do it: never ("off"), within
# an expression ("on"), or wherever they meet, in functions that are all inlined ("fast"). x86-64
# has it as an extension.
CONTRACT_FLAGS = ["-mllvm", "-inline-threshold=100000"]
if platform.machine() == "x86_64":
    CONTRACT_FLAGS += ["-target-feature", "+fma"]
# Calls before each load, store, memcpy and memset; see runtime/memory.cpp.
CHECK_FLAGS = [
    "-fsanitize=kernel-address",
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
    *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
    *("-mllvm", "-asan-opt-same-temp=0"),
    *("-mllvm", "-asan-stack=0", "-mllvm", "-asan-globals=0"),
]
RUNTIME_FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-ffreestanding", "-fno-exceptions", "-fno-rtti"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
]


@cache
def zig() -> str:
    """Path of the ``zig`` program, which contains clang and a linker."""
    # Not every environment that collects the tests has it.
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")


@cache
def fingerprint() -> str:
    """Hash of everything but the kernel's text that decides what comes out of the compiler."""
    digest = hashlib.sha256(f"{TARGET} {version('ziglang')}".encode())
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cached(text: str, build) -> Path:
    """Path of a library; ``build(path)`` makes it beside its place, and it is linked there."""
    folder = Path(tempfile.gettempdir()).resolve() / f"metal_emulator_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: set TMPDIR to a folder of your own.")
    path = folder / f"{hashlib.sha256((fingerprint() + text).encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            build(made)
            # Never replaces a file: another process may have made it meanwhile, and mapped it.
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
    return path


def link(objects: list[Path], path: Path) -> None:
    """Links a shared library; names it lacks are found in the process when it is loaded."""
    command = [zig(), "ld.lld", "-shared", "--unresolved-symbols=ignore-all", "-o", str(path)]
    subprocess.run([*command, *map(str, objects)], check=True, capture_output=True)


@cache
def runtime() -> ctypes.CDLL:
    """The loaded runtime, ``runtime/*.cpp``, whose functions the kernels find by name."""

    def build(path: Path) -> None:
        objects = []
        for source in sorted((FOLDER / "runtime").glob("*.cpp")):
            objects.append(path.with_name(f"{source.stem}.o"))
            command = [zig(), "clang", "-target", TARGET, *RUNTIME_FLAGS, "-c", str(source)]
            subprocess.run([*command, "-o", str(objects[-1])], check=True, capture_output=True)
        link(objects, path)

    return ctypes.CDLL(str(cached("runtime", build)), mode=ctypes.RTLD_GLOBAL)


def compile_text(text: str, name: str, prelude: str, scratch: Path, *flags: str) -> None:
    """Compiles a text after a prelude and checks its syntax tree; a KernelFault if it is rejected.

    ``flags`` say what clang's front end proper, which takes exactly these, makes beside the tree.
    """

    def clang(*more: str) -> subprocess.Popen:
        command = [zig(), "clang", "-cc1", "-triple", TARGET, *KERNEL_FLAGS, *more, str(source)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    source = scratch / "kernel.metal"
    source.write_text(f'{prelude}#line 1 "{name}"\n{text}')
    compiler = clang(*flags)
    tree, _ = clang("-ast-dump").communicate()
    _, messages = compiler.communicate()
    if compiler.returncode:
        words = {"__global": "device", "__local": "threadgroup", "__constant": "constant"}
        words |= {"__private": "thread", "__generic ": "", "__bf16": "bfloat", f"{FOLDER}/": ""}
        for theirs, ours in words.items():
            messages = messages.replace(theirs, ours)
        lines = [line for line in messages.splitlines() if not line.startswith("entry.metal")]
        raise KernelFault("compile", "\n".join([f"{name} does not compile.", *lines]))
    check_syntax_tree(tree.splitlines(), name)


def compile_kernel(text: str, entry: str, name: str, check: bool, contract: str) -> Path:
    """Compiles a kernel as MLX writes it to a shared library; a KernelFault if it is rejected.

    Args:
        text: Header, signature and source.
        entry: C++ appended to it: the function that the runtime calls for each thread.
        check: Whether accesses are checked and counted.
        contract: ``off``, ``on`` or ``fast``.
    """

    def build(path: Path) -> None:
        made = path.with_suffix(".o")
        whole = f'{translate(text, file_name)}\n#line 1 "entry.metal"\n{entry}'
        flags = ["-emit-obj", "-o", str(made), f"-ffp-contract={contract}"]
        if check:
            flags += CHECK_FLAGS
        if contract == "off":
            # Without inlining, this takes less time.
            flags.append("-O1")
        else:
            # More is joined where functions are inlined.
            flags += ["-O2", *CONTRACT_FLAGS]
        compile_text(whole, file_name, MLX_PRELUDE, path.parent, *flags)
        link([made], path)

    file_name = f"{name}.metal"
    return cached(f"{check} {contract} {name} {text} {entry}", build)


def check_standalone(path: Path) -> None:
    """Compiles a ``.metal`` file and the files it includes, as ``xcrun metal -c`` would."""
    whole = LOCAL_INCLUDE.sub(lambda line: (path.parent / line[1]).read_text(), path.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        text = translate(whole, path.name)
        compile_text(text, path.name, "", Path(scratch), "-fsyntax-only")
