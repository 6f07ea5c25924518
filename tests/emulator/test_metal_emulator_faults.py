"""Every fault that the emulator knows, each in a kernel that is wrong in this one way."""

import sys

import mlx.core as mx
import pytest

from metal_emulator import Emulator, KernelFault
from metal_emulator.single import ramp, run_kernel

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="the emulator needs Linux; a Mac runs kernels on its GPU"
)

INDEX = "uint i = thread_position_in_grid.x; "
TID = "uint t = thread_index_in_threadgroup; "
SHARED = "threadgroup float s[64]; " + TID + "s[t] = 0; "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "
FAULTS = {
    "missing barrier": ("race", SHARED + BARRIER + "s[t] = a[t]; out[t] = s[63 - t];"),
    "barrier for other memory": (
        "race",
        SHARED + "threadgroup_barrier(mem_flags::mem_device); out[t] = s[63 - t];",
    ),
    "missing second barrier": (
        "race",
        SHARED + "for (int i = 0; i < 2; ++i) { s[t] = a[t]; " + BARRIER + "out[t] = s[t ^ 1]; }",
    ),
    "simdgroup_barrier across simdgroups": (
        "race",
        SHARED
        + BARRIER
        + "s[t] = a[t]; simdgroup_barrier(mem_flags::mem_threadgroup); out[t] = s[63 - t];",
    ),
    "lock step is no barrier": ("race", SHARED + "simd_sum(1.0f); out[t] = s[t ^ 1];"),
    "two threads write one output": ("race", TID + "out[t] = 0; out[t / 2] = a[t];"),
    "read past the end": ("out-of-bounds", TID + "out[t] = a[t + 1];"),
    "read before the start": ("out-of-bounds", TID + "out[t] = a[int(t) - 1];"),
    "write past the end": ("out-of-bounds", TID + "out[t + 1] = a[t];"),
    "past a threadgroup array": (
        "out-of-bounds",
        SHARED + "out[t] = 0; if (t == 63) s[t + 1] = 0;",
    ),
    "write to an input": ("read-only", TID + "((device float*)a)[t] = 0; out[t] = 0;"),
    "misaligned vector": (
        "misaligned",
        TID + "out[t] = ((const device float4*)(a + t % 8))->x;",
    ),
    "pointer without address space": ("compile", TID + "const float* p = a; out[t] = p[t];"),
    "pointer of another address space": (
        "compile",
        TID + "const thread float* p = a; out[t] = p[t];",
    ),
    "cast without address space": ("compile", TID + "out[t] = ((const float*)a)[t];"),
    "return before a barrier": (
        "divergent-barrier",
        TID + "if (t == 40) return; " + BARRIER + "out[t] = a[t];",
    ),
    "barriers of two branches": (
        "divergent-barrier",
        TID + "if (t < 40) { " + BARRIER + "} else { " + BARRIER + "} out[t] = a[t];",
    ),
    "simd_sum by some lanes": (
        "divergent-barrier",
        TID + "float v = a[t]; if (t < 40) v = simd_sum(v); out[t] = v;",
    ),
    "shuffle from a lane beyond the group": (
        "inactive-lane",
        "uint i = thread_position_in_grid.x; out[i] = i < 64 ? simd_shuffle(a[i], 31) : 0;",
    ),
    "unwritten output": ("uninitialised", TID + "if (t != 13) out[t] = a[t];"),
    "output read before it is written": ("uninitialised", TID + "out[t] += a[t];"),
    "threadgroup memory never written": (
        "uninitialised",
        "threadgroup float s[64]; " + TID + "out[t] = s[t];",
    ),
    "too much threadgroup memory": (
        "threadgroup-memory",
        "threadgroup float s[8192], r; " + TID + "s[t] = a[t]; r = 0; out[t] = 0;",
    ),
    "threadgroup variable with initialiser": (
        "compile",
        "threadgroup float s[2] = {0, 0}; out[thread_index_in_threadgroup] = 0;",
    ),
    "double": ("compile", TID + "double v = a[t]; out[t] = v;"),
    "min of uint and int": ("compile", TID + "out[t] = min(t, 5);"),
    "max of half and float": ("compile", TID + "out[t] = max(half(a[t]), 0.0f);"),
    "unknown name": ("compile", TID + "out[t] = std::exp(a[t]);"),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("order", ["forward", "shuffle"])
def test_fault_is_caught(case, order):
    kind, source = FAULTS[case]
    edge = 40 if kind == "inactive-lane" else 64
    with pytest.raises(KernelFault) as fault:
        run_kernel(source, ramp(), grid=edge, shape=(edge,), emulator=Emulator(order))
    assert fault.value.kind == kind, str(fault.value)
    assert "/" not in str(fault.value).split("\n")[0]  # names the kernel, not a path


def test_fault_says_where():
    with pytest.raises(
        KernelFault, match=r"thread 63 \(63, 0, 0\) of threadgroup \(0, 0, 0\)"
    ) as f:
        run_kernel(TID + "out[t] = a[t + 1];", ramp())
    assert "reads 4 bytes outside buffer 'a' of 64 elements, at index 64" in str(f.value)
    with pytest.raises(KernelFault, match="threadgroup_barrier while thread 40 is at the end"):
        run_kernel(FAULTS["return before a barrier"][1], ramp())
    with pytest.raises(KernelFault, match=r"test\w*\.metal:\d+.*'p' has no address space"):
        run_kernel(FAULTS["pointer without address space"][1], ramp())


def test_race_between_threadgroups():
    with pytest.raises(KernelFault, match="of another threadgroup") as fault:
        run_kernel(TID + "out[t] = a[t];", ramp(128), grid=128)
    assert fault.value.kind == "race"


@pytest.mark.parametrize(
    "statement",
    ["out[i] = a[i] * 2.0f;", "out[i] = 0.0f;", "out[i] = 1;", "T v = a[i]; v += 1.0f;"],
)
def test_bfloat_is_not_converted_implicitly(statement):
    options = dict(dtype=mx.bfloat16, template=[("T", mx.bfloat16)])
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
