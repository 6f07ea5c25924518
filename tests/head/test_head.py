"""The whole head against a brute-force reference: route, select, score, expand, token."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import ROUNDING
from mlx_flashhead.head.flash_head import FlashHead
from tiny_models import FORMS, fitted, random_clusters, random_rows


def float64(array: mx.array) -> np.ndarray:
    """The array's values, exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


class Reference:
    """A head of rows, token_ids (C, n), centroids and always scored tokens.

    Attributes:
        logits: (R, V) dense logits of the states.
        scores: (R, C) of stage 1, infinite for the clusters that are always scored.
    """

    def __init__(self, rows, token_ids, centroids, eos_token_ids, hidden: mx.array):
        states = float64(hidden).reshape(-1, hidden.shape[-1])
        self.logits = states @ float64(rows.dequantized(mx.float32)).T
        if rows.bias is not None:
            self.logits = self.logits + float64(rows.bias)
        scores = states @ float64(centroids.matrix.dequantized(mx.float32)).T
        forced = np.isin(token_ids, list(eos_token_ids)).any(axis=1)
        self.scores = np.where(forced, np.inf, scores + float64(centroids.bias))
        self.tail_offset, self.token_ids = float64(centroids.tail_offset), token_ids
        self.cluster_of = np.empty(rows.n_rows, dtype=int)
        for cluster, ids in enumerate(token_ids):
            self.cluster_of[ids[ids < rows.n_rows]] = cluster

    def is_a_best_choice(self, row: int, clusters: set[int], tolerance: float) -> bool:
        """Whether no other cluster scores higher than one of ``clusters``, within ``tolerance``."""
        others = np.delete(self.scores[row], list(clusters))
        return not len(others) or self.scores[row, list(clusters)].min() >= others.max() - tolerance

    def expanded(self, row: int, clusters: set[int]) -> np.ndarray:
        """(V,) logits when ``clusters`` are scored: the others get the mean of a log-normal."""
        scored = np.isin(self.cluster_of, list(clusters))
        best = self.logits[row, scored].max()
        cap = best - max(1.0, abs(best) / 64)
        # a cluster that is always scored, but was not, counts as certain: it gets the cap
        tail = np.minimum(self.scores[row] + self.tail_offset, cap)
        return np.where(scored, self.logits[row], tail[self.cluster_of])


SCORE_SLACK = 1e-3  # of float32 scores
# V, D, cluster_size, n_probes, leading axes of the hidden states, always scored tokens
SIZES = [
    (203, 64, 8, 5, (1, 1), ()),
    (203, 96, 16, 3, (3, 1), (202,)),
    (100, 32, 10, 1, (1, 5), ()),
    (64, 64, 8, 7, (3, 5), (0, 1, 2)),
    (61, 160, 60, 1, (1, 1), ()),
    (61, 32, 61, 1, (3,), (4,)),
    (50, 64, 64, 1, (1, 5), ()),
    (9, 32, 1, 4, (1, 1), (8,)),
    (37, 32, 4, 10, (2, 2, 2), ()),
    (40, 32, 4, 2, (1, 1), (1, 9, 17, 33)),
]
FLOAT_SIZES = [
    (203, 50, 8, 5, (3, 5), (202,)),
    (61, 33, 16, 2, (1, 1), ()),
    (30, 8, 7, 4, (2,), ()),
]
CASES = [(form, size) for form in FORMS for size in SIZES]
CASES += [(form, size) for form in ("float32", "float16", "bfloat16") for size in FLOAT_SIZES]


def make_head(form, size, *, bias=False):
    """A random head on the portable path, its reference for random states, and these."""
    vocab_size, hidden_size, cluster_size, n_probes, shape, eos_token_ids = size
    rng = np.random.default_rng(0)
    rows = random_rows(rng, vocab_size, hidden_size, bias=bias, **FORMS[form])
    token_ids = random_clusters(rng, vocab_size, cluster_size)
    parts = rows, token_ids, fitted(rows, token_ids)
    head = FlashHead(*parts, n_probes=n_probes, eos_token_ids=eos_token_ids, backend="mlx")
    hidden = mx.array(rng.normal(size=(*shape, hidden_size)).astype(np.float32))
    hidden = hidden.astype(FORMS[form].get("dtype", mx.float32))
    return head, rows, Reference(*parts, eos_token_ids, hidden), hidden


def close(actual: mx.array, expected: np.ndarray, form: str, slack: float = 1e-4) -> np.ndarray:
    """Where logits are equal up to summation, rounding to their dtype, and ``slack``."""
    rounding = ROUNDING[actual.dtype]
    # MLX's CPU products of 16-bit states with quantized rows are also summed in 16 bits
    summation = rounding * (150 if "bits" in FORMS[form] else 16)
    return np.abs(float64(actual) - expected) <= slack + summation + 2 * rounding * np.abs(expected)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form, size", CASES)
def test_head_computes_the_formula(form, size, bias):
    vocab_size, _, cluster_size, n_probes, shape, _ = size
    head, rows, reference, hidden = make_head(form, size, bias=bias)
    ids, candidates = head.candidates(hidden)
    logits, tokens = head.unverified_logits(hidden), head.token(hidden)
    assert ids.dtype == tokens.dtype == mx.uint32
    assert logits.dtype == candidates.dtype == rows.matmul(hidden).dtype
    assert ids.shape == candidates.shape == (*shape, n_probes * cluster_size)
    assert (logits.shape, tokens.shape) == ((*shape, vocab_size), shape)
    assert np.isfinite(float64(logits)).all()

    blocks = np.array(ids).reshape(-1, n_probes, cluster_size)
    candidates, logits = candidates.reshape(len(blocks), -1), logits.reshape(len(blocks), -1)
    for row, block in enumerate(blocks):
        clusters = {int(reference.cluster_of[b[b < vocab_size][0]]) for b in block}
        assert len(clusters) == n_probes
        assert {tuple(b) for b in block} == {tuple(reference.token_ids[c]) for c in clusters}
        assert reference.is_a_best_choice(row, clusters, SCORE_SLACK)

        real = block.ravel() < vocab_size
        scored = block.ravel()[real]
        assert (float64(candidates[row])[~real] == mx.finfo(candidates.dtype).min).all()
        found = candidates[row][mx.array(np.flatnonzero(real))]
        assert close(found, reference.logits[row, scored], form).all()
        assert np.array_equal(float64(logits[row])[scored], float64(found))

        if n_probes < head.n_clusters:
            expected = reference.expanded(row, clusters)
            assert close(logits[row], expected, form, slack=SCORE_SLACK).all()

        token = tokens.reshape(-1)[row].item()
        assert token == scored[float64(found) == float64(found).max()].min()
        assert token == np.argmax(float64(logits[row]))


@pytest.mark.parametrize("form", ["float32", "4-bit-bfloat16"])
def test_nothing_is_evaluated(form):
    """Within a transformation MLX refuses to evaluate, so a head that did would raise."""
    head, _, _, hidden = make_head(form, (203, 64, 8, 5, (3, 5), (202,)))

    def everything(hidden):
        logits, tokens = head.unverified_logits(hidden), head.token(hidden)
        with head.settings(draw_temperature=1.0):
            drawn = head(hidden)
        scores = head.cluster_scores(hidden)
        return logits, tokens, head(hidden), drawn, *head.candidates(hidden), scores

    outputs = mx.compile(everything)(hidden)
    assert [output.shape for output in outputs[:2]] == [(3, 5, 203), (3, 5)]
    with pytest.raises(ValueError, match="eval"):  # what it looks like when something is
        mx.compile(lambda x: head(x).max().item())(hidden)
