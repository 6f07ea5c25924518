"""The one exception of the emulator, and its words for what the runtime finds."""

import ctypes

# As in runtime/state.h.
KINDS = ("", "out-of-bounds", "read-only", "misaligned", "uninitialised", "race")
KINDS += ("divergent-barrier", "inactive-lane", "threadgroup-memory")
NOWHERE, NOBODY = 0xFFFFFFFF, 2000  # no region, and from which number on no thread is meant


class KernelFault(RuntimeError):
    """A kernel that Apple's compiler would refuse, or that breaks a rule while it runs."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind  # ``compile``, or one of ``KINDS``


def runtime_fault(name, fault) -> KernelFault:
    """Words a fault as the runtime left it."""
    kind = KINDS[fault.kind]
    said = f"Kernel '{name}': {kind}, thread {fault.thread} of threadgroup {tuple(fault.group)}"
    if fault.region != NOWHERE:
        offset = ctypes.c_int64(fault.offset).value  # negative before the buffer's start
        verb = "write" if fault.write else "read"
        said += f", {verb} of {fault.size} bytes at byte {offset} of '{fault.name.decode()}'"
    if kind in ("race", "divergent-barrier") and fault.other < NOBODY:
        where = "another threadgroup" if fault.other_threadgroup else "it"
        said += f", against thread {fault.other} of {where}"
    return KernelFault(kind, f"{said}.")
