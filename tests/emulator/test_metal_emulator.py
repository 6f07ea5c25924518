"""The Metal emulator: right answers in every order of threads, exact counts, files by themselves.

Faults have tests of their own.
"""

import sys

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import Emulator, KernelFault, Traffic, check_standalone
from metal_emulator.single import ramp, run_kernel

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="the emulator needs Linux; a Mac runs kernels on its GPU"
)

ORDERS = ("forward", "reverse", "shuffle")
INDEX = "uint i = thread_position_in_grid.x; "


ROW_SUM = """
    threadgroup float partial[32];
    uint row = threadgroup_position_in_grid.x, t = thread_position_in_threadgroup.x;
    float sum = 0;
    for (int i = t; i < a_shape[1]; i += threads_per_threadgroup.x) {
        sum += float(a[row * a_shape[1] + i]);
    }
    sum = simd_sum(sum);
    if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup_index_in_threadgroup == 0) {
        sum = simd_sum(t < simdgroups_per_threadgroup ? partial[t] : 0.0f);
        if (t == 0) out[row] = T(sum);
    }
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint8, mx.bool_])
def test_row_sum_over_1024_threads_in_every_order(dtype):
    x = (mx.random.uniform(shape=(3, 1237)) * 7).astype(dtype)
    results = [
        run_kernel(
            ROW_SUM,
            x,
            shape=(3,),
            grid=3 * 1024,
            threadgroup=1024,
            template=[("T", mx.float32)],
            emulator=Emulator(order, seed=5),
        )
        for order in ORDERS
    ]
    exact = np.array(x.astype(mx.float32)).astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(np.array(results[0]), exact, rtol=1e-6)
    assert all(mx.array_equal(result, results[0]) for result in results)


def test_atomic_histogram():
    source = """
        threadgroup atomic_uint counts[8];
        uint t = thread_index_in_threadgroup;
        if (t < 8) atomic_store_explicit(&counts[t], 0, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&counts[a[t]], 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t < 8) out[t] = atomic_load_explicit(&counts[t], memory_order_relaxed);
    """
    x = mx.random.randint(0, 8, (1000,)).astype(mx.uint8)
    out = run_kernel(source, x, shape=(8,), dtype=mx.uint32, grid=1000, threadgroup=1000)
    assert np.array_equal(np.array(out), np.bincount(np.array(x), minlength=8))


def test_simd_operations_in_a_partial_simdgroup():
    """40 threads: the second simdgroup has 8 lanes."""
    source = """
        uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
        device int* row = out + i * 7;
        int v = a[i];
        row[0] = simd_sum(v);
        row[1] = simd_prefix_inclusive_sum(v);
        row[2] = simd_prefix_exclusive_sum(v);
        row[3] = simd_shuffle_xor(v, 1);
        row[4] = simd_shuffle(v, 3);
        row[5] = int((simd_vote::vote_t)simd_ballot(v % 2 == 0));
        row[6] = simd_max(v) * 1000 + simd_min(v);
    """
    x = np.random.default_rng(0).integers(0, 100, 40).astype(np.int32)
    out = np.array(run_kernel(source, mx.array(x), shape=(40, 7), dtype=mx.int32, grid=40))
    for start in (0, 32):
        v = x[start : start + 32]
        lanes = np.arange(len(v))
        ballot = int(((v % 2 == 0).astype(np.int64) << lanes).sum())
        expected = np.stack(
            [
                np.full(len(v), v.sum()),
                v.cumsum(),
                v.cumsum() - v,
                v[lanes ^ 1],
                np.full(len(v), v[3]),
                np.full(len(v), np.array(ballot).astype(np.uint32).astype(np.int32)),
                np.full(len(v), v.max() * 1000 + v.min()),
            ],
            axis=1,
        )
        assert np.array_equal(out[start : start + 32], expected)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bit_floats_round_as_in_mlx(dtype):
    """Every bit pattern survives a copy through float; products round to nearest even."""
    bits = mx.arange(1 << 16).astype(mx.uint16)
    x = bits.view(dtype)
    options = dict(
        shape=x.shape, dtype=dtype, grid=x.size, threadgroup=1024, template=[("T", dtype)]
    )
    copy = run_kernel(INDEX + "float v = a[i]; out[i] = T(v);", x, **options)
    same = (copy.view(mx.uint16) == bits) | mx.isnan(x)
    assert mx.all(same) and mx.array_equal(mx.isnan(copy), mx.isnan(x))
    product = run_kernel(INDEX + "out[i] = T(float(a[i]) * 0.3333f);", x, **options)
    expected = (x.astype(mx.float32) * 0.3333).astype(dtype)
    assert mx.all((product == expected) | mx.isnan(x))


AT_69 = {  # of 70 threads in threadgroups of 64
    "thread_position_in_grid.x": 69, "thread_position_in_threadgroup.x": 5,
    "threadgroup_position_in_grid.x": 1, "threads_per_threadgroup.x": 6,
    "dispatch_threads_per_threadgroup.x": 64, "threads_per_grid.x": 70, "grid_size.x": 70,
    "threadgroups_per_grid.x": 2, "thread_index_in_threadgroup": 5, "thread_index_in_simdgroup": 5,
    "simdgroup_index_in_threadgroup": 0, "simdgroups_per_threadgroup": 1,
    "dispatch_simdgroups_per_threadgroup": 2, "thread_index_in_quadgroup": 1,
    "quadgroup_index_in_threadgroup": 1, "quadgroups_per_threadgroup": 2,
    "dispatch_quadgroups_per_threadgroup": 16, "thread_execution_width": 32,
    "threads_per_simdgroup": 32, "grid_origin.x": 0,
    "a_shape[1]": 3, "a_strides[0]": 3, "a_ndim": 2, "b": 7, "c[1]": 1,
}  # fmt: skip


def test_every_attribute_and_input():
    writes = "".join(f"out[{i}] = uint({name}); " for i, name in enumerate(AT_69))
    inputs, n = (mx.zeros((4, 3)), 7, mx.arange(3)), len(AT_69)
    source = f"if (thread_position_in_grid.x == 69) {{ {writes}}}"
    found = run_kernel(source, *inputs, shape=(n,), dtype=mx.uint32, grid=70)
    assert dict(zip(AT_69, found.tolist(), strict=True)) == AT_69


def test_traffic_is_exact():
    """64 threads read every second float of 128, twice the same word of b, and write bytes."""
    emulator = Emulator()
    run_kernel(
        INDEX + "out[i] = uchar(a[2 * i]) + b[0];",
        ramp(128),
        ramp(16, mx.uint8),
        dtype=mx.uint8,
        emulator=emulator,
    )
    (dispatch,) = emulator.dispatches
    assert dispatch.name == "test" and dispatch.grid == dispatch.threadgroup == (64, 1, 1)
    assert dispatch.barriers == 0 and dispatch.threadgroup_bytes == 0
    assert dispatch.buffers == {
        "a": Traffic(512, reads=256, distinct_bytes_read=256, lines_read=4),
        "b": Traffic(16, reads=64, distinct_bytes_read=1, lines_read=1),
        "out": Traffic(64, writes=64, distinct_bytes_written=64, lines_written=1),
    }


def test_without_checks_the_answer_is_the_same():
    emulator = Emulator(check=False)
    x = mx.random.normal((2, 500))
    options = dict(shape=(2,), grid=512, threadgroup=256, template=[("T", mx.float32)])
    assert mx.array_equal(
        run_kernel(ROW_SUM, x, emulator=emulator, **options), run_kernel(ROW_SUM, x, **options)
    )
    assert emulator.dispatches[0].buffers["a"] == Traffic(x.nbytes)


def test_installed_replaces_and_restores():
    original = mx.fast.metal_kernel, mx.metal.is_available
    emulator = Emulator()
    with pytest.raises(ZeroDivisionError), emulator.installed():
        assert mx.metal.is_available()
        kernel = mx.fast.metal_kernel(
            name="copy", input_names=["a"], output_names=["out"], source=INDEX + "out[i] = a[i];"
        )
        (out,) = kernel(
            inputs=[ramp()],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
        )
        assert mx.array_equal(out, ramp())
        raise ZeroDivisionError
    assert (mx.fast.metal_kernel, mx.metal.is_available) == original
    assert [dispatch.name for dispatch in emulator.dispatches] == ["copy"]


STANDALONE = """
#include <metal_stdlib>
using namespace metal;
constant constexpr int WIDTH = 4;
struct Best { float value; uint index; };
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void copy(
    const device T* x [[buffer(0)]], device T* out [[buffer(1)]],
    const constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  threadgroup Best best[WIDTH];  // shared by the threadgroup
  best[i % WIDTH] = Best{float(x[i]), i};
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (int(i) < n) out[i] = T(best[i % WIDTH].value);
}
template [[host_name("copy_float")]] [[kernel]] void copy<float>(
    const device float* x [[buffer(0)]], device float* out [[buffer(1)]],
    const constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]);
template [[host_name("copy_bfloat")]] [[kernel]] decltype(copy<bfloat>) copy<bfloat>;
kernel void clear(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  out[i] = 0;
}
"""


def test_standalone_file(tmp_path):
    path = tmp_path / "good.metal"
    path.write_text(STANDALONE)
    check_standalone(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("using namespace metal;", "", "mem_flags"),
        ("device T* out", "T* out", "copy"),
        ("  if (int(i) < n)", "  const T* p = x; if (int(i) < n)", "'p' has no address space"),
        ("uint i [[thread_position_in_grid]]) {\n", "uint i) {\n", "'uint i' has no attribute"),
        ("[[thread_position_in_grid]]) {\n", "[[thread_in_grid]]) {\n", "'thread_in_grid'"),
        ("T(best[i % WIDTH].value)", "best[i % WIDTH].value", "bfloat"),
        ("struct Best", "threadgroup float loose[4];\nstruct Best", "body of a kernel"),
        ("copy<bfloat>;", "copy<missing>;", "missing"),
    ],
)
def test_standalone_file_with_a_mistake(tmp_path, old, new, message):
    assert old in STANDALONE
    path = tmp_path / "bad.metal"
    path.write_text(STANDALONE.replace(old, new))
    with pytest.raises(KernelFault, match=r"bad\.metal") as fault:
        check_standalone(path)
    assert message in str(fault.value)
