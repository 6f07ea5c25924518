"""The Metal kernels, each broken in one way: the emulator must notice.

A Mac would run most of these, and give wrong results now and then.
"""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import (
    changed_kernels,
    cluster,
    kernels,
    make_centroids,
    make_rows,
    on_gpu,
)
from mlx_flashhead.head.draw import Draws
from mlx_flashhead.head.kernels import MetalSteps
from mlx_flashhead.head.steps import Candidates, Selection

pytestmark = pytest.mark.skipif(on_gpu(), reason="an emulator's checks: a GPU runs wrong kernels")

BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
FAULTS = {  # the step that must fail: kind of fault, text of the kernels, text in its place
    "select: no barrier before the distances are counted": (
        "uninitialised",
        f"  }}\n{BARRIER}  return simd_max(",
        "  }\n  return simd_max(",
    ),
    "select: no barrier before the bin is read": (
        "race",
        f"{BARRIER}  const uint of_other",
        "  const uint of_other",
    ),
    "select: no barrier before the counts are read": (
        "uninitialised",
        f"{BARRIER}  const uint every_better",
        "  const uint every_better",
    ),
    "select: a barrier that only some threads reach": (
        "divergent-barrier",
        "  clear_bins<SELECT_BINS>(",
        "  if (first_id >= uint(C)) return;\n  clear_bins<SELECT_BINS>(",
    ),
    "select: ids past the last cluster": ("out-of-bounds", "id < uint(C) ?", "true ?"),
    "select: a place past the last probe": (
        "race",
        "(bin == last && equal_before < remaining)",
        "bin == last",
    ),
    "select: places that nothing is written to": (
        "uninitialised",
        "i = n_read + thread_id;",
        "i = n_read + 1 + thread_id;",
    ),
    "select: another address space": (
        "address-space",
        "threadgroup uint* shared,             // [SELECT_SHARED]",
        "device uint* shared,",
    ),
    "expand: a missing address space": (
        "address-space",
        "uint key, threadgroup uint* shared",
        "uint key, uint* shared",
    ),
    "route: rows past the last cluster": ("out-of-bounds", "min(ROWS, int(C - cluster))", "ROWS"),
    "route: positions past the last": ("out-of-bounds", "min(H, int(n_hidden - position))", "H"),
    "route: a simdgroup whose lanes part": (
        "divergent-barrier",
        "totals[i] = Rows::reduce(totals[i]);",
        "if (lane < 31) totals[i] = Rows::reduce(totals[i]);",
    ),
    "score: rows past the end of a cluster": ("race", "min(BLOCK, N - first)", "BLOCK"),
    "score: one simdgroup returns before the barrier": (
        "divergent-barrier",
        "  uint highest = 0;\n  for (int first",
        "  uint highest = 0;\n  if (simdgroup > 0) return;\n  for (int first",
    ),
    "expand: tokens past the vocabulary": ("out-of-bounds", "token < uint(V)", "true"),
    "expand: tokens left out": ("uninitialised", "token < uint(V)", "token < uint(V - 1)"),
    "expand: a place that is no probe's": ("out-of-bounds", "(word & PLACE)", "word"),
    "sample: no barrier before the best is read": (
        "uninitialised",
        f"  }}\n{BARRIER}  const uint other",
        "  }\n  const uint other",
    ),
    "sample: no barrier before the mass is added up": (
        "uninitialised",
        f"    }}\n  {BARRIER}    mass = simd_sum(",
        "    }\n    mass = simd_sum(",
    ),
    "sample: memory that is used again without a barrier": (
        "race",
        "shared + 2 * ROW_SIMDGROUPS, simdgroup, lane);\n  if (thread_id",
        "shared, simdgroup, lane);\n  if (thread_id",
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
    held = mx.minimum(mx.arange(8), 3).astype(mx.uint32)  # four probes, the last one repeated
    probes = mx.broadcast_to(held, (3, 8))
    places = mx.array([0, 1, 2, 3], dtype=mx.uint32) + 0xFFC00000
    words = mx.concatenate([mx.broadcast_to(places, (3, 4)), scores[:, 4:].view(mx.uint32)], 1)
    logits = mx.take(mx.array(rng.normal(size=(3, 4, 6))).astype(mx.bfloat16), held, axis=1)
    selection = Selection(probes, words, mx.zeros((3, 2)))
    keys = mx.zeros((3, 2), dtype=mx.uint32)
    drawing = Draws(mx.full((3, 3), 0.9), mx.ones(3, dtype=mx.uint32), keys, sorts=True)
    candidates = Candidates(logits, logits.max(axis=-1).astype(mx.float32))
    steps = MetalSteps(clustered)
    return {
        "route": lambda: steps.route(hidden),
        # some scores are equal, and the second call has fewer than 8 of them
        "select": lambda: [steps.select(mx.round(s), 4) for s in (scores, scores[:1])],
        "score": lambda: steps.score(hidden, selection),
        "expand": lambda: steps.expand(scores, selection, candidates),
        "sample": lambda: steps.sample(selection, candidates, selection.unscored, drawing),
    }


def test_the_steps_themselves_are_sound():
    with kernels():
        for step in run_steps().values():
            step()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(fault):
    from metal_emulator import KernelFault

    kind, right, wrong = FAULTS[fault]
    with changed_kernels(right, wrong), kernels():
        step = run_steps()[fault.split(":")[0]]
        with pytest.raises(KernelFault) as found:
            step()
    assert found.value.kind == kind, str(found.value)
