"""The top-p of mlx-lm 0.31, whose sums are rounded: what is certain is what it draws."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.decoding import certainty
from mlx_flashhead.decoding.certainty import Kept, is_certain_draw, kept_from_least
from mlx_flashhead.decoding.random_state import split
from mlx_flashhead.decoding.sampler import normalized
from mlx_flashhead.head.draw import DrawSettings

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
N_TRUTHS = 6


def old_top_p(logprobs, top_p):
    """As 0.31.3 computes it: (1, V) → (1, V)."""
    order = mx.argsort(logprobs, axis=-1)
    sums = mx.cumsum(mx.take_along_axis(mx.exp(logprobs), order, axis=-1), axis=-1)
    place = mx.put_along_axis(mx.zeros_like(order), order, mx.arange(order.size)[None], axis=-1)
    kept = mx.take_along_axis(sums, place, axis=-1) > 1 - top_p
    return mx.where(kept, logprobs, -float("inf"))


def old_sampler(logprobs, settings, key):
    """The token that 0.31.3 draws: its filters in its order."""
    kept = old_top_p(logprobs, settings.top_p)
    if settings.min_p:
        lowest = mx.max(kept, axis=-1, keepdims=True) + float(np.log(settings.min_p))
        kept = mx.where(kept < lowest, -float("inf"), kept)
    if settings.top_k:
        others = mx.argpartition(-kept, kth=settings.top_k - 1, axis=-1)[..., settings.top_k :]
        kept = mx.put_along_axis(kept, others, mx.array(-float("inf"), kept.dtype), axis=-1)
    mx.random.seed(key[0] << 32 | key[1])
    return mx.random.categorical(kept * (1 / settings.temperature)).item()


def bounded_logits(rng, dtype, *, n_tokens, spread, doubt):
    """Bounds of some logits, and logits between them. Many are equal in 16 bits."""
    logits = mx.array(rng.normal(scale=spread, size=(1, n_tokens)).astype(np.float32))
    off = doubt * mx.array(rng.random((1, n_tokens)).astype(np.float32))
    low = (logits - off).astype(dtype)
    high = (logits + off).astype(dtype)
    truths = [low, high]
    for _ in range(N_TRUTHS - 2):
        share = mx.array(rng.random((1, n_tokens)).astype(np.float32))
        if rng.random() < 0.5:  # the worst cases are at the bounds
            share = mx.round(share)
        truth = low.astype(mx.float32) * (1 - share) + high.astype(mx.float32) * share
        truths.append(mx.clip(truth.astype(dtype), low, high))
    return low, high, truths


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [30, 20_000])
def test_bounds_of_what_is_kept(dtype, n_tokens):
    """A true cut keeps what is surely kept, and nothing that is not maybe kept."""
    rng = np.random.default_rng(n_tokens)
    n_unsure = n_kept = 0
    for _ in range(8):
        top_p, spread = rng.choice([0.3, 0.8, 0.9, 0.95]), rng.choice([2.0, 4.0])
        doubt = rng.choice([0.0, 0.01, 0.2])
        low, high, truths = bounded_logits(
            rng, dtype, n_tokens=n_tokens, spread=spread, doubt=doubt
        )
        surely, maybe, n_surely = kept_from_least(low, high, float(top_p))
        for truth in truths:
            kept = old_top_p(normalized(truth), float(top_p)) > -mx.inf
            assert mx.all(kept | ~surely).item()
            assert mx.all(maybe | ~kept).item()
            best = mx.argsort(truth.astype(mx.float32), axis=-1)[:, n_tokens - n_surely.item() :]
            assert mx.all(mx.take_along_axis(kept, best, axis=-1)).item()
        n_unsure += (maybe & ~surely).sum().item()
        n_kept += surely.sum().item()
    assert n_kept > 0
    if n_tokens == 30:
        assert n_unsure < n_kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_certain_is_drawn(dtype):
    rng = np.random.default_rng(5)
    certain = wanted = 0
    choices = (
        DrawSettings(0.7, 0.9, sums_from_least=True),
        DrawSettings(1.3, 0.5, sums_from_least=True),
        DrawSettings(1.2, 0.95, min_p=0.02, top_k=5, sums_from_least=True),
        DrawSettings(2.0, 0.8, top_k=12, sums_from_least=True),
    )
    for case in range(120):
        settings = choices[case % len(choices)]
        doubt = rng.choice([0.0, 0.005, 0.05])
        low, high, truths = bounded_logits(rng, dtype, n_tokens=40, spread=3.0, doubt=doubt)
        before = (case, 17)
        key = split(before)[1]
        tokens = [old_sampler(normalized(truth), settings, before) for truth in truths]
        epsilon = mx.finfo(dtype).eps
        for token in sorted(set(tokens)):
            if is_certain_draw(low, high, token, settings, key, epsilon).item():
                assert set(tokens) == {token}
                certain += 1
        wanted += len(set(tokens)) == 1
    assert certain > wanted / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_at_the_cut_are_in_doubt(dtype):
    """Of four equal tokens the order of a sort decides which are kept."""
    logits = mx.log(mx.array([[0.5, 0.125, 0.125, 0.125, 0.125]])).astype(dtype)
    surely, maybe, _ = kept_from_least(logits, logits, 0.7)
    assert surely.tolist() == [[True, False, False, False, False]]
    assert maybe.tolist() == [[True] * 5]


def test_a_sum_that_16_bits_lose_is_lost():
    """4,000 tokens share a third: on a CPU their sum in bfloat16 does not reach a tenth."""
    probabilities = mx.concatenate([mx.full((1, 4000), 1 / 12000), mx.array([[2 / 3]])], axis=-1)
    logits = mx.log(probabilities)
    for dtype in DTYPES:
        rounded = logits.astype(dtype)
        surely, maybe, _ = kept_from_least(rounded, rounded, 0.9)
        truth = (old_top_p(normalized(rounded), 0.9) > -mx.inf).sum().item()
        assert truth > 1 or dtype != mx.float32
        assert surely.sum().item() <= truth <= maybe.sum().item()
        assert (maybe.sum().item() > 1) is (truth > 1)


def test_top_k_may_keep_a_token_below_one_that_is_dropped(monkeypatch):
    """A GPU's sums need not rise: where the second is dropped, top-2 keeps the third."""
    kept = Kept(mx.array([[False, True, False]]), mx.array([[True] * 3]), mx.array([[1]]))
    monkeypatch.setattr(certainty, "kept_from_least", lambda *_: kept)
    settings = DrawSettings(1.0, 0.9, top_k=2, sums_from_least=True)
    logits = mx.array([[0.1, 0.5, 0.3]])
    certain = 0
    for seed in range(60):
        key = split((seed, 1))[1]
        if is_certain_draw(logits, logits, 1, settings, key, 1e-7).item():
            certain += 1
            for dropped in (0, 2):
                left = mx.where(mx.arange(3) == dropped, -mx.inf, logits)
                assert mx.random.categorical(left, key=mx.array(key, mx.uint32)).item() == 1
    assert certain
