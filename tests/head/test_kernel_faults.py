"""The Metal kernels, each broken in one way: the emulator must notice.

A Mac would run most of these, and give wrong results now and then.
"""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import cluster, kernels, make_centroids, make_rows, on_gpu
from mlx_flashhead.head import kernels as module
from mlx_flashhead.head.kernels import MetalSteps, kernel_source
from mlx_flashhead.head.steps import Candidates, Selection

pytestmark = pytest.mark.skipif(on_gpu(), reason="an emulator's checks: a GPU runs wrong kernels")

BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
FAULTS = {  # the step that must fail: kind of fault, text of flash_head.metal, text in its place
    "select: no barrier before the digits are counted": (
        "uninitialised",
        f"    }}\n  {BARRIER}    FLASH_HEAD_UNROLL\n    for (int i = 0; i < KEYS",
        "    }\n    FLASH_HEAD_UNROLL\n    for (int i = 0; i < KEYS",
    ),
    "select: no barrier before the threshold is read": (
        "uninitialised",
        f"  {BARRIER}    threshold |= chosen[0]",
        "    threshold |= chosen[0]",
    ),
    "select: no barrier where memory is used again": (
        "race",
        f"= equal;\n  }}\n{BARRIER}",
        "= equal;\n  }\n",
    ),
    "select: a barrier that only some threads reach": (
        "divergent-barrier",
        "  uint threshold = 0;",
        "  if (first_id >= uint(C)) return;\n  uint threshold = 0;",
    ),
    "select: ids past the last cluster": ("out-of-bounds", "id < uint(C) ?", "true ?"),
    "select: a rank past the last probe": (
        "race",
        "(is_equal != 0u && equal_before < remaining)",
        "is_equal != 0u",
    ),
    "select: another address space": (
        "compile",
        "threadgroup uint* totals,            // [2 · SELECT_SIMDGROUPS]",
        "device uint* totals,",
    ),
    "token: a missing address space": (
        "address-space",
        "float value, threadgroup float* shared",
        "float value, float* shared",
    ),
    "route: rows past the last cluster": ("out-of-bounds", "min(ROWS, int(C - cluster))", "ROWS"),
    "route: positions past the last": ("out-of-bounds", "min(H, int(n_hidden - position))", "H"),
    "route: a simdgroup whose lanes part": (
        "divergent-barrier",
        "totals[i] = simd_sum(totals[i]);",
        "if (lane < 31) totals[i] = simd_sum(totals[i]);",
    ),
    "score: rows past the end of a cluster": ("race", "min(ROWS, N - int(first))", "ROWS"),
    "score: no barrier before the maxima are read": (
        "uninitialised",
        f"  }}\n{BARRIER}  return simd_max(",
        "  }\n  return simd_max(",
    ),
    "score: one simdgroup returns before the barrier": (
        "divergent-barrier",
        "  float highest = -Finite<T>::highest();\n",
        "  float highest = -Finite<T>::highest();\n  if (first > 0) return;\n",
    ),
    "expand: tokens past the vocabulary": ("out-of-bounds", "token < uint(V)", "true"),
    "expand: tokens left out": ("uninitialised", "token < uint(V)", "token < uint(V - 1)"),
    "token: no barrier before the lowest id is read": (
        "uninitialised",
        f"  }}\n{BARRIER}  token = simd_min(",
        "  }\n  token = simd_min(",
    ),
    "score: an implicit conversion to bfloat": (
        "compile",
        "const T stored = to_finite<T>(logit);",
        "const T stored = logit;",
    ),
}


def run_steps():
    """Each step on inputs of its own, so that one step's fault is not another's."""
    rng = np.random.default_rng(0)
    rows = make_rows(rng, 6 * 6 - 1, 64, bits=4, group_size=64, dtype=mx.bfloat16)
    clustered = cluster(rng, rows, make_centroids(rng, 6, 64, group_size=64), 6)
    hidden = mx.array(rng.normal(size=(3, 64))).astype(mx.bfloat16)
    scores = mx.array(rng.normal(size=(3, 6)).astype(np.float32))
    probes = mx.broadcast_to(mx.arange(4, dtype=mx.uint32), (3, 4))
    ranks = mx.broadcast_to(mx.array([0, 1, 2, 3, 9, 9], dtype=mx.uint32), (3, 6))
    logits = mx.array(rng.normal(size=(3, 4, 6))).astype(mx.bfloat16)
    selection = Selection(probes, ranks)
    candidates = Candidates(logits, logits.max(axis=-1).astype(mx.float32))
    steps = MetalSteps(clustered)
    return {
        "route": lambda: steps.route(hidden),
        # some scores are equal, and the second call has fewer than 8 of them
        "select": lambda: [steps.select(mx.round(s), 4) for s in (scores, scores[:1])],
        "score": lambda: steps.score(hidden, selection),
        "expand": lambda: steps.expand(scores, selection, candidates),
        "token": lambda: steps.token(selection, candidates),
    }


def test_the_steps_themselves_are_sound():
    with kernels():
        for step in run_steps().values():
            step()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(fault, monkeypatch):
    from metal_emulator import KernelFault

    kind, right, wrong = FAULTS[fault]
    text = kernel_source()
    assert text.count(right) == 1
    monkeypatch.setattr(module, "kernel_source", lambda: text.replace(right, wrong))
    module._header.cache_clear()
    try:
        with kernels():
            step = run_steps()[fault.split(":")[0]]
            with pytest.raises(KernelFault) as found:
                step()
    finally:
        module._header.cache_clear()
    assert found.value.kind == kind, str(found.value)
