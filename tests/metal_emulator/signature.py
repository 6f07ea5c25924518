"""The text that ``mx.fast.metal_kernel`` hands to the Metal compiler, letter for letter.

Source of every rule: ``mlx/backend/common/metal_kernel.cpp`` of MLX 0.32. The tests compare this
module with MLX itself, which writes the same text while it traces ``mx.export_function``.
"""

import re
from dataclasses import dataclass

import mlx.core as mx

# Inputs with fewer elements are passed in the constant address space.
MAX_CONSTANT_ARRAY_SIZE = 8

# In MLX's order. An attribute becomes a parameter when its name occurs in the source.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

TYPE_STRINGS = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float64: "double",
    mx.complex64: "complex64_t",
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
}


@dataclass(frozen=True)
class Parameter:
    """One buffer of a kernel.

    Attributes:
        name: Its name in the kernel.
        declaration: Its type with address space, e.g. ``const device float*``.
        role: ``data`` or ``output``, or what of an input it carries: ``shape``, ``strides``,
            ``ndim``.
        position: Index of the input or output it belongs to.
    """

    name: str
    declaration: str
    role: str
    position: int


@dataclass(frozen=True)
class Signature:
    """A generated kernel.

    Attributes:
        kernel_name: The function's name.
        instance: The name with its template arguments, as it is called.
        text: Header, template line, signature, source and instantiation.
        parameters: The buffers in order.
        attributes: Names of the attributes that follow them.
    """

    kernel_name: str
    instance: str
    text: str
    parameters: list[Parameter]
    attributes: list[str]


def template_kind(value) -> str:
    """C++ kind of a template argument (bool before int: a Python bool is an int).

    Raises:
        ValueError: If it is neither a dtype nor an int nor a bool.
    """
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, mx.Dtype):
        return "typename"
    raise ValueError(
        "[metal_kernel] Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`."
    )


def template_text(value) -> str:
    """A template argument as it stands between the angle brackets."""
    if isinstance(value, mx.Dtype):
        return TYPE_STRINGS[value]
    return str(int(value))


def input_parameters(input_names, inputs, source) -> list[Parameter]:
    """Buffers of the inputs: ``constant`` below 8 elements, a reference for 0-dim arrays."""
    parameters = []
    for position, (name, array) in enumerate(zip(input_names, inputs, strict=True)):
        space = "constant" if array.size < MAX_CONSTANT_ARRAY_SIZE else "device"
        reference = "&" if array.ndim == 0 else "*"
        declaration = f"const {space} {TYPE_STRINGS[array.dtype]}{reference}"
        parameters.append(Parameter(name, declaration, "data", position))
        if array.ndim == 0:
            continue
        for role, declaration in (
            ("shape", "const constant int*"),
            ("strides", "const constant int64_t*"),
            ("ndim", "const constant int&"),
        ):
            if f"{name}_{role}" in source:
                parameters.append(Parameter(f"{name}_{role}", declaration, role, position))
    return parameters


def output_parameters(output_names, output_dtypes, atomic_outputs) -> list[Parameter]:
    """Buffers of the outputs, atomic if asked for."""
    parameters = []
    for position, (name, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        element = f"atomic<{TYPE_STRINGS[dtype]}>" if atomic_outputs else TYPE_STRINGS[dtype]
        parameters.append(Parameter(name, f"device {element}*", "output", position))
    return parameters


def write_signature(
    name, input_names, output_names, source, header, atomic_outputs, inputs, output_dtypes, template
) -> Signature:
    """Writes the kernel as MLX does.

    Args:
        name: Name given to ``metal_kernel``.
        input_names, output_names: Names of the buffers.
        source: Body of the kernel.
        header: Text that goes before it.
        atomic_outputs: Whether outputs are ``atomic<T>``.
        inputs: Arrays, 0-dim for Python scalars.
        output_dtypes: One dtype for each output.
        template: Pairs of a name and a dtype, int or bool; may be empty.
    """
    kernel_name = f"custom_kernel_{name}"
    arguments = f"<{', '.join(template_text(value) for _, value in template)}>" if template else ""
    if template:
        kernel_name += "_" + re.sub("[<>-]", "_", arguments[:-1].replace(", ", "_"))
    for array in inputs:
        kernel_name += "_" + TYPE_STRINGS[array.dtype]
        if array.ndim == 0:
            kernel_name += "s"
        elif array.size < MAX_CONSTANT_ARRAY_SIZE:
            kernel_name += "c"
    for dtype in output_dtypes:
        kernel_name += "_" + TYPE_STRINGS[dtype]

    buffers = input_parameters(input_names, inputs, source)
    outputs = output_parameters(output_names, output_dtypes, atomic_outputs)
    attributes = [attribute for attribute in ATTRIBUTES if attribute in source]

    text = header
    if template:
        kinds = ", ".join(f"{template_kind(value)} {key}" for key, value in template)
        text += f"template <{kinds}>\n"
    text += f"[[kernel]] void {kernel_name}(\n"
    for index, buffer in enumerate(buffers):
        text += f"  {buffer.declaration} {buffer.name} [[buffer({index})]],\n"
    for index, buffer in enumerate(outputs, start=len(buffers)):
        text += f"  {buffer.declaration} {buffer.name} [[buffer({index})]]"
        # MLX forgets the *_shape, *_strides and *_ndim buffers here: without an attribute the list
        # closes after the first of several outputs, and the kernel does not compile.
        open_list = index < len(inputs) + len(outputs) - 1 or attributes
        text += ",\n" if open_list else ") {\n"
    lines = [f"  {ATTRIBUTES[attribute]} {attribute} [[{attribute}]]" for attribute in attributes]
    if lines:
        text += ",\n".join(lines) + ") {\n"
    text += source + "\n}\n"

    instance = kernel_name + arguments
    if template:
        text += (
            f'\ntemplate [[host_name("{kernel_name}")]] [[kernel]] '
            f"decltype({instance}) {instance};\n"
        )
    return Signature(kernel_name, instance, text, buffers + outputs, attributes)
