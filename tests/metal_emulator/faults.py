"""The one exception of the emulator, and its words for what the runtime finds."""

import ctypes

# As in runtime/state.h.
KINDS = ("", "out-of-bounds", "read-only", "misaligned", "uninitialised", "race")
KINDS += ("divergent-barrier", "inactive-lane", "threadgroup-memory")
SEVERAL, ATOMIC, MAX_THREADS = 2000, 2001, 1024
NOWHERE = 0xFFFFFFFF
# What threads wait for: runtime/state.h, then the simd operations in the order of simd.h.
MEETINGS = {
    0: "threadgroup_barrier",
    1: "simdgroup_barrier",
    2: "the end of the kernel",
} | dict(enumerate(("simd_sum", "simd_min", "simd_max", "simd_prefix", "simd_shuffle", "vote"), 16))


class KernelFault(RuntimeError):
    """A kernel that Apple's compiler would refuse, or that breaks a rule while it runs."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind  # ``compile``, or one of ``KINDS``


def position(index: int, shape) -> tuple[int, int, int]:
    """Position (x, y, z) of a flat thread index in a threadgroup of this shape."""
    x, y, _ = shape
    return index % x, index // x % y, index // (x * y)


def actor_text(actor: int) -> str:
    """Who made an access, as the runtime's shadow memory remembers it."""
    if actor == ATOMIC:
        return "an atomic operation"
    if actor == SEVERAL:
        return "several threads"
    if actor >= MAX_THREADS:
        return f"several threads of simdgroup {actor - MAX_THREADS}"
    return f"thread {actor}"


def place(fault, buffers) -> str:
    """Where an access went: the buffer and the index of its element."""
    if fault.region == NOWHERE:
        return "an address that belongs to no buffer"
    offset = ctypes.c_int64(fault.offset).value  # negative before the buffer's start
    name = fault.name.decode()
    if fault.region >= len(buffers):
        return f"threadgroup array '{name}', at byte {offset}"
    buffer = buffers[fault.region]
    n_elements = buffer.data.size // buffer.itemsize
    return f"buffer '{name}' of {n_elements} elements, at index {offset // buffer.itemsize}"


def what_happened(kind, fault, buffers) -> str:
    """The part of a message that follows the thread."""
    where = place(fault, buffers)
    verb = "writes" if fault.write else "reads"
    if kind == "out-of-bounds":
        return f"{verb} {fault.size} bytes outside {where}"
    if kind == "read-only":
        return f"writes to input {where}"
    if kind == "misaligned":
        return f"{verb} {fault.size} bytes across their alignment in {where}"
    if kind == "uninitialised":
        return f"reads {where}, which nothing has written yet: it lacks a value, or a barrier"
    if kind == "race":
        other = actor_text(fault.other) + " of another threadgroup" * fault.other_threadgroup
        return f"{verb} {where}, which {other} accessed with no barrier for this memory between"
    if kind == "divergent-barrier":
        theirs, mine = (MEETINGS[meeting] for meeting in fault.meetings)
        another = " (another one in the source)" if theirs == mine else ""
        return f"waits at {mine} while thread {fault.other} is at {theirs}{another}"
    if kind == "inactive-lane":
        return f"reads the value of lane {fault.offset}, which its simdgroup does not have"
    return (
        f"declares '{fault.name.decode()}', which brings threadgroup memory to {fault.offset} "
        "bytes: the limit is 32768"
    )


def runtime_fault(name, launch, buffers, threadgroup) -> KernelFault:
    """Words the fault of a launch, as the runtime left it."""
    fault = launch.fault
    kind, group = KINDS[fault.kind], tuple(fault.group)
    sizes = zip(launch.grid, group, threadgroup, strict=True)
    shape = [min(n - p * t, t) for n, p, t in sizes]
    thread = f"thread {fault.thread} {position(fault.thread, shape)} of threadgroup {group}"
    return KernelFault(kind, f"Kernel '{name}': {thread} {what_happened(kind, fault, buffers)}.")
