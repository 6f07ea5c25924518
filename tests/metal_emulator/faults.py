"""The one exception of the emulator."""


class KernelFault(RuntimeError):
    """A kernel that Apple's compiler would refuse, or that breaks a rule while it runs.

    Attributes:
        kind: What was broken: ``compile``, ``address-space``, ``out-of-bounds``, ``read-only``,
            ``misaligned``, ``uninitialised``, ``race``, ``divergent-barrier``, ``inactive-lane``
            or ``threadgroup-memory``.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind
