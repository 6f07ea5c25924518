"""One kernel with one output in one line, for tests of the emulator."""

import mlx.core as mx

from .emulator import Emulator


def run_kernel(
    source,
    *inputs,
    shape=(64,),
    dtype=mx.float32,
    grid=64,
    threadgroup=64,
    template=(),
    emulator=None,
    **options,
):
    """Runs a kernel with inputs a, b, c and one output `out`; sizes are numbers or triples."""
    kernel = (emulator or Emulator()).metal_kernel(
        name="test",
        input_names=list("abc")[: len(inputs)],
        output_names=["out"],
        source=source,
        **options,
    )
    as_triple = [s if isinstance(s, tuple) else (s, 1, 1) for s in (grid, threadgroup)]
    (out,) = kernel(
        inputs=list(inputs),
        template=list(template),
        grid=as_triple[0],
        threadgroup=as_triple[1],
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return out


def ramp(n=64, dtype=mx.float32):
    return mx.arange(n).astype(dtype)
