"""The benchmark of a model: its three forms, and what is counted."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from flash_loops import make_flash
from mlx_flashhead.benchmarks import variants
from mlx_flashhead.benchmarks.model_benchmark import make_table, summary
from mlx_flashhead.benchmarks.variants import (
    DENSE,
    FLASH_HEAD,
    UNVERIFIED,
    Variant,
    with_flash_head,
)
from mlx_flashhead.models.compat.mlx_lm import generate_step
from tiny_models import VOCAB_SIZE, tiny_model


@pytest.mark.parametrize("batch", [1, 3])
def test_the_first_token_is_not_timed(monkeypatch, batch):
    """No end of text ends a run, and the first token is not counted."""
    times = iter(np.cumsum([7, 4, 4, 1, 3]))
    # mlx-lm looks at the real clock.
    clock = SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(variants, "time", clock)
    shapes = []

    def sampler(logprobs):
        shapes.append(logprobs.shape)
        return mx.zeros(logprobs.shape[:-1], mx.uint32)

    variant = Variant(tiny_model(), make_sampler=lambda: sampler)
    seconds, tokens = variant.decode([1, 2], batch, 4, {})
    # They are (4 + 4 + 1 + 3) / 4 seconds.
    assert (seconds, len(tokens)) == (3, 5)
    assert set(shapes) == {(batch, VOCAB_SIZE)} and len(shapes) >= 5


@pytest.mark.parametrize("verify", [True, False])
def test_flash_head_decodes_with_this_package_s_loops(verify):
    """With verification every token that is timed is the dense model's."""
    variant = with_flash_head(make_flash(n_probes=1).model, verify=verify)
    expected = [token for token, _ in generate_step(mx.array([1, 2]), tiny_model(), max_tokens=10)]
    for batch in (1, 3):
        seconds, tokens = variant.decode([1, 2], batch, 9, {"temp": 0.0})
        assert seconds > 0 and (tokens == expected) == verify


def test_ratios_are_those_of_the_printed_medians():
    """59.3 ms over 49.3 ms are 1.20 times, whatever the rounds were."""
    seconds = {
        DENSE: [0.0593, 0.2000, 0.0500],
        FLASH_HEAD: [0.0493, 0.0400, 0.1000],
        UNVERIFIED: [0.0479, 0.0479, 0.0479],
    }
    about = {"model": "m", "n_probes": {FLASH_HEAD: 3, UNVERIFIED: 4}, "n_clusters": 9}
    about["equal_logits"] = 1.0
    for dense in (True, False):
        figures = summary(about | {"keeps_dense_head": dense}, "greedy", 4, seconds)
        table = make_table(figures)
        assert "100.000 % of the scored logits equal MLX's." in table.caption
        assert "3 clusters of 9 scored, 4 unverified" in table.title
        assert ("stays dense" in table.caption) == dense
    assert figures["token_ms"][DENSE]["median"] == pytest.approx(59.3)
    assert figures["tokens_per_second"][FLASH_HEAD] == pytest.approx(4 / 0.0493)
    faster = {FLASH_HEAD: pytest.approx(59.3 / 49.3), UNVERIFIED: pytest.approx(59.3 / 47.9)}
    assert figures["times_faster"] == faster
