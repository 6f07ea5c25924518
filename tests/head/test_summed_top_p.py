"""The draws of mlx-lm 0.31's and oMLX's samplers with top-p: what is certain is what they draw."""

import inspect

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

import old_top_p
from draw_cases import N_PROBES, case_of, truths
from kernel_cases import plain_clusters
from mlx_flashhead.decoding.random_state import set_key, split, uniform_bits
from mlx_flashhead.decoding.sampling import normalized
from mlx_flashhead.head.draws import summed_top_p
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.inverse_cdf import InverseCDF
from mlx_flashhead.head.draws.summed_top_p import SummedTopP
from mlx_flashhead.head.operations import PortableOperations
from mlx_flashhead.head.proposal import Proposal, Tolerance

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
# of the hosts' default requests, and with every filter
SETTINGS = (
    SummedTopP(0.7, top_p=0.9),
    SummedTopP(0.7, top_p=0.95, top_k=20),
    SummedTopP(0.6, top_p=0.95, top_k=20),
    SummedTopP(0.7, top_p=0.95),
    SummedTopP(1.4, top_p=0.6),
    SummedTopP(1.3, top_p=0.95, min_p=0.01, top_k=20),
)


def dense_token(logits, settings, state):
    """What the sampler draws from logits (V,) in this random state."""
    set_key(state)
    sampler = old_top_p.make_sampler(
        settings.temperature, settings.top_p, settings.min_p, settings.top_k
    )
    return sampler(normalized(logits[None])).item()


@pytest.mark.skipif(not old_top_p.HAS_OLD_TOP_P, reason="this mlx-lm has another top-p")
def test_the_text_here_is_mlx_lms():
    texts = map(inspect.getsource, (sample_utils.apply_top_p, old_top_p.apply_top_p))
    own, here = (text[text.index("probs = mx.exp") :].split() for text in texts)
    assert own == here


@pytest.mark.parametrize("nearest", [256, 20, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_certain_is_drawn(dtype, nearest, monkeypatch):
    monkeypatch.setattr(summed_top_p, "NEAREST", nearest)
    rng = np.random.default_rng(11)
    operations = PortableOperations(plain_clusters(rng, 300, 4))
    epsilon = mx.finfo(dtype).eps
    n_certain = 0
    n_same = 0
    n_cases = 0
    for case in range(66):
        settings = SETTINGS[case % len(SETTINGS)]
        doubt = float(rng.choice([0.0, 1e-4, 0.02]))
        slots, proposal, draws, tolerance, state = case_of(
            rng, operations.clustered, dtype, settings, rng.choice([2.0, 4.0]), doubt
        )
        certain = operations.screen(slots, proposal, draws, tolerance, epsilon).certain.item()
        tokens = {
            dense_token(logits, settings, state)
            for logits in truths(rng, operations.clustered, slots, proposal, tolerance)
        }
        if certain:
            assert tokens == {proposal.tokens.item()}, (case, settings)
        n_certain += certain
        n_same += tokens == {proposal.tokens.item()}
        n_cases += 1
    assert n_same > n_cases / 3
    # Where many tokens that are kept are neither scored nor near, little is certain.
    if nearest > 1:
        share = 0.6 if dtype == mx.float32 else 0.4
        assert n_certain > n_same * share
    assert n_certain


def proposal_of(logits, clustered, token=None, draws=None):
    """The logits (V,) in clusters, and a proposal: of a token, or of what is drawn."""
    lowest = mx.array([mx.finfo(logits.dtype).min]).astype(logits.dtype)
    slots = mx.concatenate([logits, lowest])[clustered.token_ids][None]
    probes = mx.argsort(-slots.max(axis=-1), axis=-1)[:, :N_PROBES].astype(mx.uint32)
    scored = mx.take_along_axis(slots, probes[..., None], axis=1)
    if token is None:
        ids = clustered.token_ids[probes].flatten(1)
        tokens = SummedTopP.choose(scored.flatten(1), draws, ids)
    else:
        tokens = mx.array([token], mx.uint32)
    return slots, Proposal(mx.zeros((1, 4)), tokens, probes, scored, mx.zeros(1))


EXACT = Tolerance(mx.zeros(1), mx.zeros(1))


@pytest.mark.parametrize("kind, expected", [(SummedTopP, True), (InverseCDF, False)])
def test_sums_of_16_bits_lose_the_least_likely(kind, expected):
    """Of 2,400 tokens with 0.0002 each the rounded sum ends below 0.1: top-p keeps the best alone.

    In exact numbers it keeps most of them.
    """
    clustered = plain_clusters(np.random.default_rng(0), 301, 8)
    n_small = clustered.vocab_size - 1
    by_token = np.full(n_small + 1, np.log(0.0002), np.float32)
    by_token[7] = np.log(1 - n_small * 0.0002)
    logits = mx.array(by_token).astype(mx.bfloat16)
    sampler = old_top_p.make_sampler(1.0, 0.9)
    assert {sampler(normalized(logits[None])).item() for _ in range(20)} == {7}

    slots, proposal = proposal_of(logits, clustered, token=7)
    bits = int(np.float32(0.9).view(np.uint32))
    draws = Draws.of([(kind(1.0, top_p=0.9), (bits, 0))])
    operations = PortableOperations(clustered)
    found = operations.screen(slots, proposal, draws, EXACT, mx.finfo(mx.bfloat16).eps)
    assert found.certain.item() is expected


@pytest.mark.parametrize("top_k, kept", [(3, {0, 1, 2}), (8, {0, 1, 2, 3, 4})])
def test_top_k_sees_what_top_p_has_left(top_k, kept):
    """Each number draws one of the tokens that both filters keep."""
    clustered = plain_clusters(np.random.default_rng(0), 75, 4)
    operations = PortableOperations(clustered)
    logits = mx.array(-0.5 * np.arange(clustered.vocab_size, dtype=np.float32))
    settings = SummedTopP(1.0, top_p=0.9, top_k=top_k)
    seen = set()
    for seed in range(60):
        state = (seed, 1)
        draws = Draws.of([(settings, (uniform_bits([split(state)[1]])[0], 0))])
        slots, proposal = proposal_of(logits, clustered, draws=draws)
        if operations.screen(slots, proposal, draws, EXACT, 1e-7).certain.item():
            assert dense_token(logits, settings, state) == proposal.tokens.item()
            seen.add(proposal.tokens.item())
    assert seen == kept


def is_certain(masses, proposed, number, top_p, dtype=mx.bfloat16):
    """Whether a token is drawn for sure, where some have these masses and all others none."""
    clustered = plain_clusters(np.random.default_rng(0), 75, 4)
    by_token = np.full(clustered.vocab_size, -60.0, np.float32)
    for token, mass in masses.items():
        by_token[token] = np.log(mass)
    slots, proposal = proposal_of(mx.array(by_token).astype(dtype), clustered, token=proposed)
    bits = int(np.float32(number).view(np.uint32))
    draws = Draws.of([(SummedTopP(1.0, top_p=top_p), (bits, 0))])
    operations = PortableOperations(clustered)
    return operations.screen(slots, proposal, draws, EXACT, mx.finfo(dtype).eps).certain.item()


# What bfloat16 makes of exp(-2.296875), the log-probability of a mass of 0.1.
TENTH = 0.1005859375


@pytest.mark.parametrize("proposed, kept", [(3, False), (90, True)])
def test_a_sum_at_the_cut_is_in_doubt(proposed, kept):
    """The exponential may be a spacing larger or smaller."""
    masses = {3: 1 - np.exp(-2.296875), 90: np.exp(-2.296875)}
    number = 0.95
    assert not is_certain(masses, proposed, number, top_p=1 - TENTH)
    for left, is_kept in ((1.05 * TENTH, False), (0.95 * TENTH, True)):
        assert is_certain(masses, proposed, number, top_p=1 - left) == (is_kept == kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_tokens_at_the_cut_either_may_be_left_out(dtype):
    masses = {10: 0.1, 50: 0.8, 90: 0.1}
    assert not is_certain(masses, 10, 0.05, top_p=0.85, dtype=dtype)
    assert not is_certain(masses, 90, 0.95, top_p=0.85, dtype=dtype)
    assert is_certain(masses, 50, 0.5, top_p=0.85, dtype=dtype)


def test_sums_may_fall_from_one_place_to_the_next(monkeypatch):
    """A GPU adds blocks: a token may be left out, and a less likely one kept, also by top-k."""
    cumsum = mx.cumsum

    def of_blocks(array, **options):
        share = 1 - 0.2 * (mx.arange(array.shape[-1]) % 2)
        return (cumsum(array, **options) * share).astype(array.dtype)

    rng = np.random.default_rng(5)
    operations = PortableOperations(plain_clusters(rng, 300, 4))
    n_certain = 0
    for case in range(150):
        top_k = 4 if case % 2 else 0
        settings = SummedTopP(1.0, top_p=0.8, top_k=top_k)
        slots, proposal, draws, tolerance, state = case_of(
            rng, operations.clustered, mx.bfloat16, settings, 3.0, 0.0
        )
        logits = slots[0].flatten()[operations.clustered.slot_of]
        with monkeypatch.context() as patch:
            patch.setattr(mx, "cumsum", of_blocks)
            certain = operations.screen(slots, proposal, draws, tolerance, 2.0**-7).certain.item()
            drawn = dense_token(logits, settings, state)
        if certain:
            assert drawn == proposal.tokens.item(), case
        n_certain += certain
    assert n_certain > 20
