"""scripts/compare_paths.py: both paths' tokens, and what it prints where they differ."""

import itertools

import mlx.core as mx

import compare_paths
from kernel_cases import kernels
from mlx_flashhead.head.metal_operations import MetalOperations


def test_both_paths_give_the_same_tokens_and_a_wrong_kernel_is_named(run, converted, monkeypatch):
    """The logit of token 5 is far too high, not only by a tie's rounding."""
    for gap, tie in ((1e-4, True), (1e-2, False)):
        logits = mx.array([0, 0, 20.0, 0, 20.0 + gap])
        assert compare_paths.verdict(logits, (2, 4))[0] == tie
    flags = ("--model", converted, "--max-tokens", 6, "--prompt", "One day")
    right = MetalOperations.expand
    calls = itertools.count()

    def wrong(self, *arguments):
        logits = right(self, *arguments)
        # The first call is the kernels' self-check.
        if next(calls) == 0:
            return logits
        return mx.concatenate([logits[:, :5], logits[:, 5:6] + 50, logits[:, 6:]], axis=-1)

    with kernels():
        code, printed, _ = run(compare_paths, *flags)
        assert code == 0 and printed.endswith("6 of 6 tokens are the same.\n")
    monkeypatch.setattr(MetalOperations, "expand", wrong)
    with kernels():
        code, printed, _ = run(compare_paths, *flags)
    assert code == 1 and "no tie" in printed
    assert "of 6 tokens are the same, then metal takes token 5 and mlx token" in printed
