"""Biases, penalties and masks of the scored tokens: mlx-lm's own values, on both paths."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from kernel_cases import kernels, make_clustered, to_numpy
from mlx_flashhead.head.adjustment import Adjustment, ChangedTokens
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.logit_map import IDENTITY, LogitMap
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import NOTHING_ALLOWED, PortableOperations

BOTH = pytest.mark.parametrize("path", [PortableOperations, MetalOperations])
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
N_CLUSTERS = 60
SIZE = 8
PADDED = 3
N_PROBES = 9
VOCAB_SIZE = N_CLUSTERS * SIZE - PADDED

# The tokens before each position, of which the last is not read yet, and the settings.
CONTEXTS = [[5, 9, 9, 200, 9], [7, 7, 300, 12], [400], [11, 3, 450, 460, 3]]
BIASES = {5: 2.5, 9: -1.75, 470: 7.0}
SETTINGS = {
    "bias": {"logit_bias": BIASES},
    "repetition": {"repetition_penalty": 1.3, "repetition_context_size": 3},
    "presence": {"presence_penalty": 0.7},
    "both": {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.4, "frequency_context_size": 4},
    "all": {
        "logit_bias": BIASES,
        "repetition_penalty": 0.8,
        "presence_penalty": -0.3,
        "frequency_penalty": 1.1,
        "repetition_context_size": 2,
    },
}


def changed_tokens(context, settings) -> ChangedTokens:
    """What the settings change after the context but its last token, which is not read yet."""

    def window(name):
        if f"{name}_penalty" not in settings:
            return []
        size = settings.get(f"{name}_context_size", 20)
        return context[-size:][:-1]

    counted = window("frequency")
    return ChangedTokens(
        repetition=settings.get("repetition_penalty", 1.0),
        presence=settings.get("presence_penalty", 0.0),
        frequency=settings.get("frequency_penalty", 0.0),
        biases=settings.get("logit_bias", {}),
        repeated=window("repetition"),
        present=window("presence"),
        occurrences={token: counted.count(token) for token in counted},
    )


def adjustment_of(settings) -> Adjustment:
    latest = mx.array([context[-1] for context in CONTEXTS], mx.uint32)
    positions = [changed_tokens(context, settings) for context in CONTEXTS]
    return Adjustment.of(positions, latest, VOCAB_SIZE)


def case(dtype, seed=0):
    rng = np.random.default_rng(seed)
    clustered = make_clustered(
        rng, N_CLUSTERS, SIZE, 128, padded=PADDED, bits=16, group_size=0, dtype=dtype
    )
    return clustered, mx.array(rng.normal(size=(len(CONTEXTS), 128)) * 4).astype(dtype)


def scored(operations, hidden, adjustment, logit_map=IDENTITY):
    """A selection and the model's logits of its tokens."""
    scores = PortableOperations(operations.clustered).route(hidden)
    n_probes = N_PROBES + adjustment.n_tokens
    selection = operations.select(scores, n_probes, words=False, adjustment=adjustment)
    return selection, operations.score(hidden, selection, logit_map)


def in_token_order(operations, selection, candidates):
    """Logits (R, V) by token, NaN where a token is not scored."""
    ids = to_numpy(operations.token_ids(selection.probes)).reshape(len(CONTEXTS), -1)
    full = np.full((len(CONTEXTS), VOCAB_SIZE + 1), np.nan, np.float32)
    for i, logits in enumerate(to_numpy(candidates.logits).reshape(len(CONTEXTS), -1)):
        # Probes that are repeated count once.
        first = np.unique(ids[i], return_index=True)[1]
        full[i, ids[i][first]] = logits[first]
    return full[:, :-1]


@BOTH
@DTYPES
@pytest.mark.parametrize("name", SETTINGS)
def test_the_values_are_mlx_lms(path, dtype, name):
    """To the last bit, from the logits as they were scored; and all its tokens are scored."""
    settings = SETTINGS[name]
    logit_map = LogitMap(cap=9.0)
    processors = make_logits_processors(**settings)
    clustered, hidden = case(dtype)
    with kernels():
        operations = path(clustered)
        adjustment = adjustment_of(settings)
        selection, candidates = scored(operations, hidden, adjustment, logit_map)
        before = in_token_order(operations, selection, candidates)
        adjusted = operations.adjust(selection, candidates, adjustment, None)
        found = in_token_order(operations, selection, adjusted)
        if adjusted.best is not None:
            np.testing.assert_array_equal(
                to_numpy(adjusted.best), to_numpy(adjusted.logits).max(axis=-1)
            )
    changed = np.zeros_like(found, bool)
    for i, context in enumerate(CONTEXTS):
        logits = mx.array(before[i : i + 1]).astype(dtype)
        for processor in processors:
            logits = processor(mx.array(context), logits)
        expected = to_numpy(logits)[0]
        known = ~np.isnan(before[i])
        assert known[[*changed_tokens(context, settings).token_ids, context[-1]]].all()
        np.testing.assert_array_equal(found[i][known], expected[known])
        changed[i] = known & (found[i] != before[i])
    assert changed.any(axis=1).all()


@BOTH
@DTYPES
def test_infinite_biases_leave_finite_logits(path, dtype):
    """Infinite logits alone would give NaN, where mlx-lm's log-probabilities do, too."""
    clustered, hidden = case(dtype)
    biases = {5: float("inf"), 9: -float("inf")}
    with kernels():
        operations = path(clustered)
        adjustment = adjustment_of({"logit_bias": biases})
        selection, candidates = scored(operations, hidden, adjustment)
        adjusted = operations.adjust(selection, candidates, adjustment, None)
        found = in_token_order(operations, selection, adjusted)
    assert not np.isinf(found).any()
    assert (found[:, 5] == mx.finfo(dtype).max).all()
    assert (found[:, 9] == mx.finfo(dtype).min).all()


@BOTH
def test_the_other_probes_are_the_best(path):
    """The tokens' clusters are probed beside those that would be."""
    clustered, hidden = case(mx.float32)
    with kernels():
        operations = path(clustered)
        scores = PortableOperations(clustered).route(hidden)
        adjustment = adjustment_of(SETTINGS["all"])
        plain = operations.select(scores, N_PROBES, words=False).probes[:, :N_PROBES]
        found = operations.select(scores, 50, words=False, adjustment=adjustment)
        for one, other in zip(plain.tolist(), found.probes.tolist(), strict=True):
            assert set(one) <= set(other)
            assert len(set(other)) == 50


def masks(rng, shares):
    """Words (R, W) whose bits say what may be chosen, and the bits (R, V)."""
    n_words = -(-VOCAB_SIZE // 32)
    bits = rng.random((len(shares), n_words * 32)) < np.array(shares)[:, None]
    words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    return mx.array(words), bits[:, :VOCAB_SIZE]


@BOTH
@pytest.mark.parametrize("draws", [Greedy(), Noise(1.0, top_p=0.9), Noise(0.8)], ids=str)
@pytest.mark.parametrize("adjusts", [False, True])
def test_what_is_masked_is_never_chosen(path, draws, adjusts):
    """A position whose scored tokens are all masked says so."""
    clustered, hidden = case(mx.float16)
    rng = np.random.default_rng(1)
    words, bits = masks(rng, [0.5, 0.05, 0.0, 1.0])
    if adjusts:
        adjustment = adjustment_of(SETTINGS["all"])
        applied = adjustment
    else:
        adjustment = adjustment_of({})
        applied = None
    of = Draws.of([(draws, position_key(1, i)) for i in range(len(CONTEXTS))])
    with kernels():
        operations = path(clustered)
        selection, candidates = scored(operations, hidden, adjustment)
        unmasked = candidates
        if adjusts:
            unmasked = operations.adjust(selection, candidates, adjustment, None)
        before = in_token_order(operations, selection, unmasked)
        masked = operations.adjust(selection, candidates, applied, words)
        found = in_token_order(operations, selection, masked)
        tokens, risk = operations.choose(selection, masked, of, masked=True)
        tokens = tokens.tolist()
        risk = risk.tolist()
    lowest = np.finfo(np.float16).min
    known = ~np.isnan(before)
    np.testing.assert_array_equal(found[known], np.where(bits, before, lowest)[known])
    for i in (0, 1, 3):
        assert bits[i, tokens[i]] and risk[i] <= 1
        if draws.greedy:
            assert found[i, tokens[i]] == np.nanmax(found[i])
    assert risk[2] == NOTHING_ALLOWED


def test_both_paths_propose_the_same():
    """With biases, penalties and masks together, greedy and drawn."""
    clustered, hidden = case(mx.float32)
    rows = clustered.token_rows(), np.array(clustered.token_ids), clustered.centroids
    words, _ = masks(np.random.default_rng(2), [0.7] * 4)
    settings = [Greedy(), Noise(1.0), Noise(0.7, 0.8), Noise(2, 1, 0, 5)]
    draws = Draws.of([(s, position_key(1, i)) for i, s in enumerate(settings)])
    changes = {"adjustment": adjustment_of(SETTINGS["all"]), "logit_map": LogitMap(cap=12.0)}
    with kernels():
        results = []
        for backend in ("metal", "mlx"):
            head = FlashHead(*rows, n_probes=N_PROBES, backend=backend)
            proposals = [
                head.propose(hidden, of, allowed=allowed, **changes)
                for of in (None, draws)
                for allowed in (None, words)
            ]
            results.append([(p.tokens.tolist(), p.risk.tolist()) for p in proposals])
    for found, expected in zip(*results, strict=True):
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adjusts", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_penalty_or_a_mask_adds_one_dispatch(adjusts, masked):
    clustered, hidden = case(mx.bfloat16)
    rows = clustered.token_rows(), np.array(clustered.token_ids), clustered.centroids
    words, _ = masks(np.random.default_rng(2), [0.7] * 4)
    adjustment = adjustment_of(SETTINGS["all"])
    mx.eval(words, adjustment[:2])
    with kernels() as emulator:
        head = FlashHead(*rows, n_probes=N_PROBES, backend="metal")
        change = adjustment if adjusts else None
        allowed = words if masked else None
        proposal = head.propose(hidden, None, adjustment=change, allowed=allowed)
        mx.eval(proposal.tokens, proposal.risk)
    if emulator is not None:
        n_dispatches = 5 if adjusts or masked else 4
        assert len(emulator.dispatches) == n_dispatches
