"""The whole head on the portable path against float64: route, select, score, expand, token."""

import pickle
import threading
from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest

import kernel_checks as checks
import retrieval
from kernel_cases import ROUNDING, to_numpy
from mlx_flashhead.head.flash_head import FlashHead
from retrieval import best_token
from tiny_models import FORMS, fitted, random_clusters, random_rows

# V, D, cluster_size, n_probes, leading axes of the hidden states, always scored tokens
SIZES = [
    (203, 64, 8, 5, (1, 1), ()),
    (203, 96, 16, 3, (3, 1), (202,)),
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
    """A random head on the portable path, and random states."""
    vocab_size, hidden_size, cluster_size, n_probes, shape, eos_token_ids = size
    rng = np.random.default_rng(0)
    rows = random_rows(rng, vocab_size, hidden_size, bias=bias, **FORMS[form])
    token_ids = random_clusters(rng, vocab_size, cluster_size)
    settings = {"n_probes": n_probes, "eos_token_ids": eos_token_ids, "backend": "mlx"}
    head = FlashHead(rows, token_ids, fitted(rows, token_ids), **settings)
    hidden = mx.array(rng.normal(size=(*shape, hidden_size)).astype(np.float32))
    return head, rows, hidden.astype(FORMS[form].get("dtype", mx.float32))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form, size", CASES)
def test_head_computes_the_formula(form, size, bias):
    vocab_size, hidden_size, cluster_size, n_probes, shape, _ = size
    head, rows, hidden = make_head(form, size, bias=bias)
    states = hidden.reshape(-1, hidden_size)
    clustered = head.clustered
    results = checks.all_operations(head.operations, states, n_probes)
    scores, selection, candidates, full, token = results
    checks.check_scores(clustered, states, scores)
    probes = to_numpy(selection.probes)
    scores = to_numpy(scores)
    for row, chosen in zip(scores, probes, strict=True):
        others = np.delete(row, chosen)
        # Each cluster is chosen once.
        assert len(others) == head.n_clusters - n_probes
        assert row[chosen].min() >= others.max(initial=-np.inf)
    # MLX's CPU products of 16-bit states with quantized rows are also summed in 16 bits.
    n_roundings = 150 if "bits" in FORMS[form] else 16
    summation = ROUNDING[full.dtype] * n_roundings
    checks.check_candidates(clustered, states, selection, candidates, 1e-4 + summation)
    checks.check_full(clustered, results[0], selection, candidates, full)
    checks.check_token(full, token)

    ids, logits = retrieval.candidates(head, hidden)
    assert ids.shape == logits.shape == (*shape, n_probes * cluster_size)
    assert mx.array_equal(ids, clustered.token_ids[selection.probes].reshape(ids.shape))
    assert mx.array_equal(logits, candidates.logits.reshape(ids.shape))
    logits = head.unverified_logits(hidden)
    assert (logits.shape, logits.dtype) == ((*shape, vocab_size), rows.matmul(hidden).dtype)
    if n_probes < head.n_clusters:
        assert mx.array_equal(logits, full.reshape(logits.shape))
    else:
        assert mx.array_equal(logits, head.dense_logits(hidden))
    assert mx.array_equal(best_token(head, hidden), token.reshape(shape)) and ids.dtype == mx.uint32


@pytest.mark.compiled
@pytest.mark.parametrize("form", ["float32", "4-bit-bfloat16"])
def test_nothing_is_evaluated(form):
    """Within a transformation MLX refuses to evaluate, so a head that did would raise."""
    head, _, hidden = make_head(form, (203, 64, 8, 5, (3, 5), (202,)))

    def everything(hidden):
        logits = head.unverified_logits(hidden)
        tokens = best_token(head, hidden)
        with head.settings(draw_temperature=1.0):
            drawn = head(hidden)
        scores = head.operations.route(hidden[0])
        return logits, tokens, head(hidden), drawn, *retrieval.candidates(head, hidden), scores

    outputs = mx.compile(everything)(hidden)
    assert [output.shape for output in outputs[:2]] == [(3, 5, 203), (3, 5)]
    # This is what an evaluation looks like.
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda x: head(x).max().item())(hidden)


@pytest.mark.parametrize("form", ["float16", "8-bit-float16"])
def test_estimates_below_the_range_of_float16_are_finite(form):
    """A cluster of tokens that are never drawn would else give a filter minus infinity or NaN."""
    head, _, hidden = make_head(form, (203, 64, 8, 5, (2,), ()))
    scores = head.operations.route(hidden)
    selection = head.operations.select(scores, 5)
    candidates = head.operations.score(hidden, selection)
    full = head.operations.expand(scores - 1e6, selection, candidates)
    assert full.dtype == mx.float16
    assert full.min().item() == mx.finfo(mx.float16).min


def in_a_thread(function):
    """What the function returns in a new thread, with a stream of its own."""
    found = []

    def use():
        with mx.stream(mx.new_stream(mx.default_device())):
            found.append(function())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return found[0]


def test_a_pickled_head_works_in_a_thread_that_has_not_loaded_it():
    """An array that is not evaluated belongs to the thread that has made it."""
    head, _, hidden = make_head("float32", (203, 64, 8, 5, (1, 1), ()))
    states = hidden.reshape(1, -1)
    mx.eval(states, head.arrays())
    expected = head.propose(states, None).tokens.tolist()
    loaded = pickle.loads(pickle.dumps(head))
    assert in_a_thread(lambda: loaded.propose(states, None).tokens.tolist()) == expected


def test_each_thread_traces_for_itself():
    """MLX forgets a function's traces in one thread, and a later one may have its address."""
    head, _, hidden = make_head("float32", (203, 64, 8, 5, (1, 1), ()))
    states = hidden.reshape(1, -1)
    mx.eval(states, head.arrays())

    def propose():
        return head.propose(states, None).tokens.tolist()

    found = [propose(), propose(), in_a_thread(propose)]
    assert found[0] == found[1] == found[2] and head.n_traced == 2


def test_a_block_that_intercepts_calls_is_for_its_thread_and_its_head_and_ends():
    head, _, hidden = make_head("float32", (203, 64, 8, 5, (1, 1), ()))
    mx.eval(hidden, head.arrays())
    copied = deepcopy(head)
    expected = head(hidden)

    def is_intercepted(of=head):
        return not mx.array_equal(of(hidden), expected).item()

    with head.intercepted(lambda states: states):
        with head.intercepted(lambda states: states + 1):
            assert mx.array_equal(head(hidden), hidden + 1)
        assert mx.array_equal(head(hidden), hidden)
        assert not is_intercepted(copied) and not in_a_thread(is_intercepted)
        assert not is_intercepted(pickle.loads(pickle.dumps(head)))
    with pytest.raises(ZeroDivisionError), head.intercepted(lambda states: 1 / 0):
        head(hidden)
    assert not is_intercepted()
