"""The text that ``mx.fast.metal_kernel`` hands to the Metal compiler, from MLX itself: it writes it
while it traces a function for export, on a machine without Metal too."""

import re
from dataclasses import dataclass

import mlx.core as mx

# This is MLX's own, also while the emulator is installed.
metal_kernel = mx.fast.metal_kernel

# Where the attributes stand in ``Indices`` of runtime/state.h, or how they follow from it.
ATTRIBUTES = {
    "thread_position_in_grid": 0,
    "thread_position_in_threadgroup": 3,
    "threadgroup_position_in_grid": 6,
    "threads_per_threadgroup": 9,
    "threads_per_grid": 12,
    "threadgroups_per_grid": 15,
    "thread_index_in_threadgroup": "i[18]",
    "thread_index_in_simdgroup": "i[19]",
    "simdgroup_index_in_threadgroup": "i[20]",
    "simdgroups_per_threadgroup": "i[21]",
    "threads_per_simdgroup": "32u",
}
PARAMETER = re.compile(r"^  (.+) (\w+) \[\[(\w+)", re.MULTILINE)
INSTANCE = re.compile(r"decltype\(.*\) (.*);\s*$")


@dataclass(frozen=True)
class Signature:
    """A generated kernel.

    Attributes:
        name: The function's.
        text: Header, template line, signature, source and instantiation.
    """

    name: str
    text: str

    @property
    def parameters(self) -> dict[str, str]:
        """Declarations such as ``const device float*``: the buffers, then the attributes."""
        head = self.text.split(f"void {self.name}(\n")[1].split(") {\n")[0]
        return {name: declaration for declaration, name, _ in PARAMETER.findall(head)}

    def entry(self) -> str:
        """C++ that calls the kernel with the runtime's arguments: buffers ``a``, indices ``i``."""
        arguments = []
        for index, (name, declaration) in enumerate(self.parameters.items()):
            at = ATTRIBUTES.get(name)
            if isinstance(at, int):
                arguments.append(f"uint3(i[{at}], i[{at + 1}], i[{at + 2}])")
            elif at is not None:
                arguments.append(at)
            elif declaration.endswith("&"):
                arguments.append(f"*({declaration[:-1]}*)a[{index}]")
            else:
                arguments.append(f"({declaration})a[{index}]")
        function = self.name
        instance = INSTANCE.search(self.text)
        if instance is not None:
            function = instance[1]
        return (
            'extern "C" __attribute__((no_sanitize("kernel-address")))\n'
            "void metal_emulator_entry(const thread ulong* a, const thread uint* i) {\n"
            f"  {function}({', '.join(arguments)});\n}}\n"
        )


def signature_of(options: dict, inputs: list[mx.array], call: dict) -> Signature:
    """The kernel as MLX writes it for arguments of ``mx.fast.metal_kernel`` and of its call."""
    kernel = metal_kernel(**options)
    events = []
    mx.export_function(events.append, lambda *given: kernel(inputs=list(given), **call), *inputs)
    made = [event["arguments"] for event in events if event.get("name") == "CustomKernel"]
    return Signature(*made[0][:2])
