"""Launches a compiled kernel on its buffers, counts its traffic, and says what went wrong."""

import ctypes
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from . import build
from .frontend import KernelFault

ORDERS = ("forward", "reverse", "shuffle")
INPUT = 0
OUTPUT = 1
# So many lie around each buffer, so that an index past its end meets no other buffer.
GUARD_BYTES = 1 << 16
ALIGNMENT = 256
# As in runtime/state.h.
KINDS = ("", "out-of-bounds", "read-only", "misaligned", "uninitialised", "race")
KINDS += ("divergent-barrier", "inactive-lane", "threadgroup-memory")
# This number is that of no region.
NOWHERE = 0xFFFFFFFF
# From this number on no thread is meant.
NOBODY = 2000

_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64
_pointer = ctypes.c_void_p
# What the runtime counts, in the order of `Traffic`.
COUNTS = ["n_read", "n_written", "distinct_read", "distinct_written", "lines_read", "lines_written"]
# The runtime runs one launch at a time.
_launch_lock = threading.Lock()


# These three mirror the structs of runtime/state.h.
class _Region(ctypes.Structure):
    _fields_ = [
        *[("base", _u64), ("bytes", _u64), ("kind", _u32), ("granule", _u32)],
        *[(name, _pointer) for name in ("cells", "read_bits", "write_bits")],
        *[(name, _u64) for name in COUNTS],
        *[("name", ctypes.c_char_p), ("id", _u64)],
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        *[(name, _u32) for name in ("kind", "region", "thread", "other", "size", "write")],
        *[("offset", _u64), ("group", _u32 * 3), ("other_threadgroup", _u32)],
        ("name", ctypes.c_char_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        *[("kernel", _pointer), ("arguments", _pointer)],
        *[("regions", ctypes.POINTER(_Region)), ("groups", _pointer)],
        *[(name, _u64) for name in ("n_groups", "image_start", "image_end", "seed")],
        *[(name, _u32) for name in ("n_regions", "order", "check")],
        *[("grid", _u32 * 3), ("threadgroup", _u32 * 3), ("barriers", _u32)],
        *[("threadgroup_bytes", _u64), ("fault", _Fault)],
    ]


@dataclass(frozen=True)
class Traffic:
    """What a dispatch moves to and from one buffer.

    Attributes:
        bytes: The size of the buffer.
        reads: Bytes that are read, repeats included.
        writes: Bytes that are written, repeats included.
        distinct_bytes_read: Bytes that are read, each counted once.
        distinct_bytes_written: Bytes that are written, each counted once.
        lines_read: Distinct 128-byte lines that are read, from the buffer's start.
        lines_written: Distinct 128-byte lines that are written.
    """

    bytes: int
    reads: int = 0
    writes: int = 0
    distinct_bytes_read: int = 0
    distinct_bytes_written: int = 0
    lines_read: int = 0
    lines_written: int = 0


@dataclass(frozen=True)
class Dispatch:
    """A launch of a kernel.

    Attributes:
        name: The kernel's.
        barriers: Threadgroup barriers passed by the threadgroup that passed most.
        threadgroup_bytes: Threadgroup memory.
        buffers: The traffic by the buffer's name. Without checks it has the sizes alone.
    """

    name: str
    barriers: int
    threadgroup_bytes: int
    buffers: dict[str, Traffic]


class Buffer:
    """Memory of one argument of a kernel, ``data`` (uint8), with a guard on both sides."""

    def __init__(self, name, kind, itemsize, n_bytes):
        self.name = name
        self.kind = kind
        self.itemsize = itemsize
        memory = np.empty(n_bytes + 2 * GUARD_BYTES + ALIGNMENT, np.uint8)
        start = GUARD_BYTES + -(memory.ctypes.data + GUARD_BYTES) % ALIGNMENT
        self.data = memory[start : start + n_bytes]

    def region(self, check: bool) -> _Region:
        """The runtime's view."""
        region = _Region(self.data.ctypes.data, self.data.size, self.kind, self.itemsize)
        region.name = self.name.encode()
        if check:
            self.bits = np.zeros((2, -(-self.data.size // 64)), np.uint64)
            region.read_bits, region.write_bits = (bits.ctypes.data for bits in self.bits)
            if self.kind == OUTPUT:
                self.cells = np.zeros((self.data.size // self.itemsize, 3), np.uint32)
                region.cells = self.cells.ctypes.data
        return region


@cache
def load(library) -> tuple[int, int, int]:
    """Loads a compiled kernel: the address of its entry, and the start and end of its image."""
    build.runtime()
    entry = ctypes.cast(ctypes.CDLL(str(library)).metal_emulator_entry, _pointer).value
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [fields[0].split("-") for fields in mapped if fields[-1] == str(library)]
    return entry, min(int(r[0], 16) for r in ranges), max(int(r[1], 16) for r in ranges)


def launch(name, library, buffers, grid, threadgroup, order, seed, check) -> Dispatch:
    """Runs a kernel over a grid; a KernelFault for the first fault found."""
    entry, image_start, image_end = load(library)
    regions = (_Region * len(buffers))(*[buffer.region(check) for buffer in buffers])
    arguments = np.array([buffer.data.ctypes.data for buffer in buffers], np.uint64)
    n_groups = int(np.prod([-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]))
    groups = np.arange(n_groups, dtype=np.uint64)
    if order == "reverse":
        groups = groups[::-1].copy()
    elif order == "shuffle":
        groups = np.random.default_rng(seed).permutation(groups)
    pointers = (entry, arguments.ctypes.data, regions, groups.ctypes.data)
    numbers = (len(groups), image_start, image_end, seed, len(buffers), ORDERS.index(order), check)
    state = _Launch(*pointers, *numbers, (_u32 * 3)(*grid), (_u32 * 3)(*threadgroup))
    with _launch_lock:
        if not build.runtime().metal_emulator_launch(ctypes.byref(state)):
            raise MemoryError("The Metal emulator could not reserve 256 MB of address space.")
    if state.fault.kind:
        raise runtime_fault(name, state.fault)
    if check:
        check_all_is_written(name, buffers)
    traffic = {
        buffer.name: Traffic(buffer.data.size, *(getattr(region, name) for name in COUNTS))
        for buffer, region in zip(buffers, regions, strict=True)
    }
    return Dispatch(name, state.barriers, state.threadgroup_bytes, traffic)


def check_all_is_written(name, buffers) -> None:
    """A KernelFault for the first output of which some elements are not written."""
    for buffer in buffers:
        if buffer.kind != OUTPUT:
            continue
        unwritten = np.flatnonzero(buffer.cells[:, 0] == 0)
        if len(unwritten):
            raise KernelFault(
                "uninitialised",
                f"Kernel '{name}' leaves {len(unwritten)} of {len(buffer.cells)} elements of "
                f"output '{buffer.name}' unwritten, the first at index {unwritten[0]}.",
            )


def runtime_fault(name, fault) -> KernelFault:
    """Words a fault as the runtime left it."""
    kind = KINDS[fault.kind]
    said = f"Kernel '{name}': {kind}, thread {fault.thread} of threadgroup {tuple(fault.group)}"
    if fault.region != NOWHERE:
        # It is negative before the buffer's start.
        offset = ctypes.c_int64(fault.offset).value
        verb = "write" if fault.write else "read"
        said += f", {verb} of {fault.size} bytes at byte {offset} of '{fault.name.decode()}'"
    if kind in ("race", "divergent-barrier") and fault.other < NOBODY:
        where = "another threadgroup" if fault.other_threadgroup else "it"
        said += f", against thread {fault.other} of {where}"
    return KernelFault(kind, f"{said}.")
