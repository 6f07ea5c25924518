"""Which tokens a draw keeps, in rows that are halved before they are sorted, and how often each."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

from draw_reference import kept
from mlx_flashhead import make_sampler
from mlx_flashhead.head import draw as draw_module
from mlx_flashhead.head.draw import (
    Draws,
    DrawSettings,
    draw,
    log_mass,
    noise_of_all,
    position_key,
    threshold,
)

SETTINGS = [
    DrawSettings(0.0),
    DrawSettings(1.0, top_p=0.05),
    DrawSettings(0.8, top_p=0.95),
    DrawSettings(0.8, top_p=0.99),
    DrawSettings(1.0, top_k=7),
    DrawSettings(1.0, top_k=1000),
    DrawSettings(1.0, min_p=0.1),
    DrawSettings(1.3, top_p=0.9, min_p=0.01, top_k=20),
]


@pytest.mark.parametrize("n_logits", [1, 2, 5, 64, 203])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_the_definitions(monkeypatch, n_logits, spread, ties):
    monkeypatch.setattr(draw_module, "SORTED", 4)
    rng = np.random.default_rng(n_logits)
    logits = rng.normal(scale=spread, size=(len(SETTINGS), n_logits)).astype(np.float32)
    logits = np.round(logits, 1) if ties else logits
    logits[:, 3::5] = -np.inf  # a mask
    for tail in (None, 0.5):  # of tokens that are not among these
        draws, rows = Draws.of([(s, (0, 0)) for s in SETTINGS]), mx.array(logits)
        total = None if tail is None else mx.logaddexp(log_mass(rows), mx.array(tail))
        found = np.array(rows >= threshold(rows, draws, total))
        for keeps, x, (_, top_p, log_min_p), top_k in zip(
            found, logits, draws.settings.tolist(), draws.top_k.tolist(), strict=True
        ):
            expected = kept(x, -np.inf if tail is None else tail, top_p, log_min_p, top_k)
            np.testing.assert_array_equal(keeps[x > -np.inf], expected[x > -np.inf])


@pytest.mark.parametrize(
    "arguments",
    [
        {"temp": 1.0},
        {"temp": 0.8, "top_p": 0.9},
        {"temp": 1.5, "min_p": 0.2},
        {"temp": 0.5, "top_k": 4},
        {"temp": 2.0, "top_p": 0.95, "min_p": 0.05, "top_k": 9},
    ],
)
def test_tokens_are_drawn_as_often_as_by_mlx_lms_sampler(arguments):
    """Total variation as of two samples of one distribution."""
    rng, n_draws, n_tokens = np.random.default_rng(4), 20_000, 12
    logits = mx.array(rng.normal(scale=1.5, size=(1, n_tokens)).astype(np.float32))
    rows = mx.repeat(logits - log_mass(logits), n_draws, axis=0)
    settings = make_sampler(**arguments).settings
    draws = Draws.of([(settings, position_key(3, i)) for i in range(n_draws)])
    mx.random.seed(0)
    ours = np.bincount(draw(rows, noise_of_all(draws.keys, n_tokens), draws), minlength=n_tokens)
    theirs = np.bincount(sample_utils.make_sampler(**arguments)(rows), minlength=n_tokens)
    assert ((ours == 0) == (theirs == 0)).all()
    samples = rng.multinomial(n_draws, (ours + theirs) / (2 * n_draws), size=(2, 200))
    distances = np.abs(samples[0] - samples[1]).sum(axis=1)
    assert np.abs(ours - theirs).sum() < distances.mean() + 5 * distances.std()
