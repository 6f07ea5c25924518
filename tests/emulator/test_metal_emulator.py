"""The Metal emulator: every fault is caught and all traffic counted.

That it computes what it should, in every order of threads, the tests of the kernels show.
"""

import re
import sys

import mlx.core as mx
import pytest
from metal_emulator import Emulator, KernelFault, Traffic

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="the emulator needs Linux; a Mac runs kernels on its GPU"
)


def run_kernel(source, *inputs, n=64, dtype=mx.float32, template=(), emulator=None, header=""):
    """A kernel of inputs a and b gives its output `out`, by n threads, 64 of them a group."""
    if emulator is None:
        emulator = Emulator()
    names = {"name": "test", "input_names": list("ab")[: len(inputs)], "output_names": ["out"]}
    kernel = emulator.metal_kernel(source=source, header=header, **names)
    outputs = {"output_shapes": [(min(n, 64),)], "output_dtypes": [dtype]}
    sizes = {"grid": (n, 1, 1), "threadgroup": (64, 1, 1), "template": list(template)}
    return kernel(inputs=list(inputs), **sizes, **outputs)[0]


def ramp(n=64, dtype=mx.float32):
    return mx.arange(n).astype(dtype)


INDEX = "uint i = thread_position_in_grid.x; "
TID = "uint t = thread_index_in_threadgroup; "
SHARED = "threadgroup float s[64]; " + TID + "s[t] = 0; "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "
PAST_END = TID + "out[t] = a[t + 1];"
NO_SPACE = TID + "const float* p = a; out[t] = p[t];"


def test_traffic_is_exact():
    """64 threads read every second float of 128, twice the same word of b, and write bytes."""
    emulator = Emulator()
    source = INDEX + "out[i] = uchar(a[2 * i]) + b[0];"
    run_kernel(source, ramp(128), ramp(16, mx.uint8), dtype=mx.uint8, emulator=emulator)
    (dispatch,) = emulator.dispatches
    assert (dispatch.name, dispatch.barriers, dispatch.threadgroup_bytes) == ("test", 0, 0)
    assert dispatch.buffers == {
        "a": Traffic(512, reads=256, distinct_bytes_read=256, lines_read=4),
        "b": Traffic(16, reads=64, distinct_bytes_read=1, lines_read=1),
        "out": Traffic(64, writes=64, distinct_bytes_written=64, lines_written=1),
    }


def test_products_and_sums_are_joined_as_configured():
    """A fused operation keeps what the product loses: (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24."""
    header = "inline float square(float x) { return x * x; }\n"
    x = mx.full((64,), 1 + 2.0**-12)
    for form, fused in {"a[i] * a[i]": {"on", "fast"}, "square(a[i])": {"fast"}}.items():
        for contract in ("off", "on", "fast"):
            emulator = Emulator(contract=contract)
            source = INDEX + f"out[i] = {form} - (1.0f + 0x1p-11f);"
            out = run_kernel(source, x, header=header, emulator=emulator)
            expected = 2.0**-24 if contract in fused else 0.0
            assert mx.all(out == expected), (form, contract)


# Kernels that are wrong in one way each.
FAULTS = [
    # a missing barrier, one for other memory, one of a simdgroup, lock step, one output of two
    ("race", SHARED + BARRIER + "s[t] = a[t]; out[t] = s[63 - t];"),
    ("race", SHARED + "threadgroup_barrier(mem_flags::mem_device); out[t] = s[63 - t];"),
    (
        "race",
        SHARED + BARRIER + "s[t] = a[t]; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); out[t] = s[63 - t];",
    ),
    ("race", SHARED + "simd_sum(1.0f); out[t] = s[t ^ 1];"),
    ("race", TID + "out[t] = 0; out[t / 2] = a[t];"),
    ("out-of-bounds", PAST_END),
    ("out-of-bounds", SHARED + "out[t] = 0; if (t == 63) s[t + 1] = 0;"),
    ("read-only", TID + "((device float*)a)[t] = 0; out[t] = 0;"),
    ("misaligned", TID + "out[t] = ((const device float4*)(a + t % 8))->x;"),
    ("divergent-barrier", TID + "if (t == 40) return; " + BARRIER + "out[t] = a[t];"),
    ("divergent-barrier", TID + "float v = a[t]; if (t < 40) v = simd_sum(v); out[t] = v;"),
    ("inactive-lane", INDEX + "out[i] = i < 64 ? simd_shuffle(a[i], 31) : 0;"),
    ("uninitialised", TID + "if (t != 13) out[t] = a[t];"),
    ("uninitialised", "threadgroup float s[64]; " + TID + "out[t] = s[t];"),
    (
        "threadgroup-memory",
        "threadgroup float s[8192], r; " + TID + "s[t] = a[t]; r = 0; out[t] = 0;",
    ),
    ("compile", NO_SPACE),
    ("compile", TID + "out[t] = ((const float*)a)[t];"),
    ("compile", "threadgroup float s[2] = {0, 0}; out[thread_index_in_threadgroup] = 0;"),
    ("compile", TID + "double v = a[t]; out[t] = v;"),
    ("compile", TID + "out[t] = min(t, 5);"),
]


@pytest.mark.parametrize("kind, source", FAULTS)
@pytest.mark.parametrize("order", ["forward", "shuffle"])
def test_fault_is_caught(kind, source, order):
    n = 40 if kind == "inactive-lane" else 64
    with pytest.raises(KernelFault) as fault:
        run_kernel(source, ramp(), n=n, emulator=Emulator(order))
    assert fault.value.kind == kind, str(fault.value)
    # It names the kernel, not a path.
    assert "/" not in str(fault.value).split("\n")[0]


def test_fault_says_where():
    where = "out-of-bounds, thread 63 of threadgroup (0, 0, 0), read of 4 bytes at byte 256 of 'a'."
    for source, n, said in (
        (PAST_END, 64, re.escape(f"Kernel 'test': {where}")),
        (NO_SPACE, 64, r"test\w*\.metal:\d+.*'p' has no address space"),
        (TID + "out[t] = a[t];", 128, "of another threadgroup"),
    ):
        with pytest.raises(KernelFault, match=said):
            run_kernel(source, ramp(n), n=n)


@pytest.mark.parametrize(
    "statement",
    ["out[i] = a[i] * 2.0f;", "out[i] = 0.0f;", "out[i] = 1;", "T v = a[i]; v += 1.0f;"],
)
def test_bfloat_is_not_converted_implicitly(statement):
    options = {"dtype": mx.bfloat16, "template": [("T", mx.bfloat16)]}
    with pytest.raises(KernelFault, match="bfloat") as fault:
        run_kernel(INDEX + statement, ramp(dtype=mx.bfloat16), **options)
    assert fault.value.kind == "compile"
    written_out = INDEX + "T v = T(2.0f); float f = a[i]; out[i] = T(f) * v;"
    out = run_kernel(written_out, ramp(dtype=mx.bfloat16), **options)
    assert mx.array_equal(out, 2 * ramp(dtype=mx.bfloat16))


def test_helper_for_device_pointers_refuses_a_small_input():
    """Below 8 elements an input is `constant`; a helper templated on the pointer takes both."""
    fixed = "inline float first(const device float* p) { return p[0]; }\n"
    templated = "template <typename P> inline float first(P p) { return p[0]; }\n"
    source = INDEX + "out[i] = first(a);"
    for n, header in ((8, fixed), (8, templated), (7, templated)):
        assert mx.all(run_kernel(source, ramp(n) + 5, header=header) == 5)
    with pytest.raises(KernelFault) as fault:
        run_kernel(source, ramp(7), header=fixed)
    assert fault.value.kind == "compile"
