"""The text that the emulator compiles is the text that MLX writes, and its errors are MLX's."""

import sys

import mlx.core as mx
import pytest

from metal_emulator import Emulator, KernelFault
from metal_emulator.signature import ATTRIBUTES, write_signature
from metal_emulator.single import ramp, run_kernel

INDEX = "uint i = thread_position_in_grid.x; "
SIGNATURES = {
    "device and constant": dict(inputs=[(8,), (7,)]),
    "no elements": dict(inputs=[(0,)]),
    "zero-dim and scalars": dict(inputs=[(), 3, 2.5, True]),
    "shape, strides, ndim": dict(
        inputs=[(2, 8), (3,)], source="a_shape[0]; a_strides[0]; a_ndim; b_ndim;"
    ),
    "shape of a scalar": dict(inputs=[()], source="a_shape; a_ndim;"),
    "shape in the header only": dict(
        inputs=[(2, 8)], header="// a_shape thread_index_in_quadgroup\n"
    ),
    "substring": dict(inputs=[(9,)], source="my_a_shape_too; not_thread_position_in_grid_x;"),
    "every attribute": dict(inputs=[(9,)], source=" ".join(ATTRIBUTES)),
    "no attribute": dict(inputs=[(9,)], source="out[0] = a[0];", no_index=True),
    "no attribute, two outputs": dict(
        inputs=[(9,)], source="", outputs=[mx.float32, mx.uint32], no_index=True
    ),
    "closes too early": dict(
        inputs=[(9,)], source="a_shape;", outputs=[mx.float32, mx.uint32], no_index=True
    ),
    "template": dict(
        inputs=[(9,)],
        template=[("T", mx.bfloat16), ("N", 4), ("M", -3), ("F", True), ("G", False)],
    ),
    "atomic outputs": dict(inputs=[(9,)], outputs=[mx.uint32, mx.float32], atomic_outputs=True),
    "dtypes": dict(
        inputs=[
            mx.zeros((9,), dtype)
            for dtype in (mx.float16, mx.bfloat16, mx.bool_, mx.int8, mx.int16, mx.int64, mx.uint64)
        ],
        outputs=[mx.uint8, mx.uint16, mx.bfloat16],
    ),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signature_is_the_one_mlx_writes(case, capfd, tmp_path):
    """MLX writes the text, and prints it on request, while it traces a function for export."""
    case = dict(SIGNATURES[case])
    arrays = [mx.zeros(x) if isinstance(x, tuple) else x for x in case["inputs"]]
    source = case.get("source", "") + ("" if case.get("no_index") else INDEX)
    outputs = case.get("outputs", [mx.float32])
    names = [f"in{i}" for i in range(len(arrays))]
    names[:2] = ["a", "b"][: len(names)]
    out_names = [f"out{i}" for i in range(len(outputs))]
    options = dict(header=case.get("header", ""), atomic_outputs=case.get("atomic_outputs", False))
    kernel = mx.fast.metal_kernel(
        name="f", input_names=names, output_names=out_names, source=source, **options
    )

    def traced(x):
        return kernel(
            inputs=arrays,
            template=case.get("template"),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * len(outputs),
            output_dtypes=outputs,
            verbose=True,
        )

    capfd.readouterr()
    mx.export_function(str(tmp_path / "f.mlxfn"), traced, mx.zeros((1,)))
    printed = capfd.readouterr().out
    expected = printed[printed.index("```\n") + 4 : printed.rindex("\n```")]

    signature = write_signature(
        "f",
        names,
        out_names,
        source,
        inputs=[x if isinstance(x, mx.array) else mx.array(x) for x in arrays],
        output_dtypes=outputs,
        template=case.get("template", []),
        **options,
    )
    assert signature.text == expected


def test_bad_arguments_are_mlx_errors():
    with pytest.raises(ValueError, match="at least one output"):
        Emulator().metal_kernel(name="f", input_names=[], output_names=[], source="")
    with pytest.raises(ValueError, match="Invalid template argument"):
        run_kernel(INDEX, template=[("T", 1.5)])
    with pytest.raises(ValueError, match=r"Thread group size \(2048\) is greater"):
        run_kernel(INDEX, threadgroup=2048)
    kernel = Emulator().metal_kernel(name="f", input_names=["a"], output_names=["o"], source="")
    sizes = dict(grid=(1, 1, 1), threadgroup=(1, 1, 1))
    with pytest.raises(ValueError, match="`inputs` to have size 1 but got size 0"):
        kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], **sizes)
    with pytest.raises(ValueError, match="Only supports the GPU"):
        kernel(inputs=[1], output_shapes=[(1,)], output_dtypes=[mx.float32], stream=mx.cpu, **sizes)


@pytest.mark.skipif(sys.platform == "darwin", reason="the emulator needs Linux")
def test_two_outputs_without_attribute_do_not_compile_with_a_shape():
    """MLX's own bug: the parameter list closes too early."""
    kernel = Emulator().metal_kernel(
        name="f", input_names=["a"], output_names=["x", "y"], source="x[0] = y[0] = a_shape[0];"
    )
    with pytest.raises(KernelFault) as fault:
        kernel(
            inputs=[ramp()],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * 2,
            output_dtypes=[mx.float32] * 2,
        )
    assert fault.value.kind == "compile"
