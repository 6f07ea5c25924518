"""Executes custom Metal kernels on the CPU, to prove them where there is no Apple GPU.

``Emulator().metal_kernel`` takes what ``mx.fast.metal_kernel`` takes, asks MLX for the text that it
would compile, compiles that text and runs it. What a GPU does silently is reported as a
:class:`KernelFault`: accesses out of bounds, races, reads of uninitialised memory, barriers that
not all threads reach, missing address spaces.

signature.py       the text MLX writes, and how the runtime calls it
frontend.py        Metal to C++ for OpenCL, and Apple's rules that clang lacks
build.py           clang from the ziglang package; compiled kernels are cached by content
run.py             launch and traffic, and what went wrong in words
emulator.py        the face of ``mx.fast.metal_kernel``
shim/              ``metal_stdlib``
runtime/           threads as fibers, barriers, simdgroups, watched memory

Not emulated: textures, simdgroup matrices, function constants, 64-bit atomics, and the rounding of
the GPU's own transcendental functions. Stricter than Metal: a simd operation needs all lanes of its
simdgroup, and half and bfloat convert to each other only through float. Not noticed: recursion, an
index past a thread's own array, a kernel's parameter or a function's result that lacks its
attribute or address space, and clashes with MLX's internal names.
"""

from .build import check_standalone
from .emulator import Emulator
from .frontend import KernelFault
from .run import Dispatch, Traffic

__all__ = ["Dispatch", "Emulator", "KernelFault", "Traffic", "check_standalone"]
