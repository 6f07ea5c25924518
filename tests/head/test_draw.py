"""Which tokens a draw keeps, in rows that are halved before they are sorted."""

import mlx.core as mx
import numpy as np
import pytest

from draw_reference import kept
from mlx_flashhead.head import draw as draw_module
from mlx_flashhead.head.draw import NO_MIN_P, Draws, DrawSettings, log_mass, threshold

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


def test_no_filter_keeps_all():
    logits = mx.array([[0.0, -50.0]])
    assert threshold(logits, Draws.of([(DrawSettings(1.0), (0, 0))])).item() == np.float32(NO_MIN_P)
