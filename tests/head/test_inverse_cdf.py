"""MLX's draws at one position by a uniform number: proposals, and which of them are certain."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from draw_cases import N_PROBES, case_of, truths
from kernel_cases import plain_clusters, to_numpy
from mlx_flashhead.decoding.random_state import DrawChain, set_key, split, uniform_bits
from mlx_flashhead.decoding.sampling import normalized
from mlx_flashhead.head.clustered import Centroids, ClusteredRows
from mlx_flashhead.head.draws import inverse_cdf
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.inverse_cdf import InverseCDF
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.logit_map import IDENTITY
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.operations import NO_DEPTH, PortableOperations
from mlx_flashhead.head.proposal import Proposal, Tolerance

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
SETTINGS = (
    InverseCDF(1.0),
    InverseCDF(0.7),
    InverseCDF(0.7, top_p=0.9),
    InverseCDF(1.4, top_p=0.6),
    InverseCDF(1.0, top_k=4),
    InverseCDF(1.5, min_p=0.05),
    InverseCDF(1.3, top_p=0.95, min_p=0.01, top_k=20),
)


def mlx_sampler(settings):
    # mlx-lm has 0 for no top-p.
    top_p = settings.top_p if settings.top_p < 1 else 0.0
    return make_sampler(
        settings.temperature,
        top_p=top_p,
        min_p=settings.min_p,
        top_k=settings.top_k,
    )


def dense_token(logits, settings, state):
    """What mlx-lm's loop draws from logits (V,) in this random state."""
    set_key(state)
    return mlx_sampler(settings)(normalized(logits[None])).item()


@pytest.mark.parametrize("n", [1, 2, 40])
def test_the_numbers_are_mlxs(n):
    keys = [mx.random.key(i * 7919 + 10**11) for i in range(n)]
    expected = [mx.random.uniform(shape=(1,), key=key).view(mx.uint32).item() for key in keys]
    assert uniform_bits([tuple(key.tolist()) for key in keys]) == expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_from_all_tokens_are_mlxs(settings):
    """Where all tokens are scored, in any order, each draw is that of mlx-lm's sampler."""
    rng = np.random.default_rng(3)
    for seed in range(20):
        logits = mx.array(rng.normal(scale=2.5, size=400).astype(np.float32))
        ids = mx.array(rng.permutation(400).astype(np.uint32))[None]
        mx.random.seed(seed)
        state = tuple(mx.random.state[0].tolist())
        draws = Draws.of([(settings, (DrawChain().number_bits(0), 0))])
        token = InverseCDF.choose(normalized(logits[None])[:, ids[0]], draws, ids)
        assert token.item() == dense_token(logits, settings, state)


@pytest.mark.parametrize("nearest", [256, 20, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_certain_is_drawn(dtype, nearest, monkeypatch):
    monkeypatch.setattr(inverse_cdf, "NEAREST", nearest)
    rng = np.random.default_rng(11)
    operations = PortableOperations(plain_clusters(rng, 300, 4))
    epsilon = mx.finfo(dtype).eps
    n_certain = 0
    n_same = 0
    n_cases = 0
    for case in range(63):
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
    # Rounding of log-probabilities in 8 bits leaves more in doubt.
    share = 0.5 if dtype == mx.float32 else 0.2
    assert n_certain > n_same * share


@pytest.mark.parametrize("nearest, least, most", [(256, 0.95, 1), (40, 0.8, 1), (1, 0, 0.4)])
def test_kept_tokens_that_are_not_scored_are_no_doubt(nearest, least, most, monkeypatch):
    """Filters may keep some tokens of the nearest clusters, if they keep none of the others."""
    monkeypatch.setattr(inverse_cdf, "NEAREST", nearest)
    rng = np.random.default_rng(12)
    operations = PortableOperations(plain_clusters(rng, 300, 4))
    settings = InverseCDF(0.7, top_p=0.9)
    same = 0
    certain = 0
    while same < 40:
        slots, proposal, draws, tolerance, state = case_of(
            rng, operations.clustered, mx.float32, settings, 4.0, 1e-5, n_probes=2
        )
        logits = next(truths(rng, operations.clustered, slots, proposal, tolerance))
        if dense_token(logits, settings, state) == proposal.tokens.item():
            same += 1
            certain += operations.screen(slots, proposal, draws, tolerance, 1e-7).certain.item()
    assert least * same <= certain <= most * same


def test_rows_with_filters_and_without_are_as_alone():
    rng = np.random.default_rng(9)
    operations = PortableOperations(plain_clusters(rng, 300, 4))
    for seed in range(20):
        cases = [
            case_of(rng, operations.clustered, mx.float32, settings, 2.5, 1e-5, n_probes=5)
            for settings in (SETTINGS[1], SETTINGS[2 + seed % 5])
        ]
        slots, proposals, draws, tolerances, _ = zip(*cases, strict=True)
        alone = [
            operations.screen(*case[:4], 1e-7).certain.item()
            for case in zip(slots, proposals, draws, tolerances, strict=True)
        ]
        both = Draws.of([(d.settings[0], tuple(d.keys[0].tolist())) for d in draws])
        fields = zip(*proposals, strict=True)
        proposal = Proposal(*map(mx.concatenate, fields))
        tolerance = Tolerance(*map(mx.concatenate, zip(*(t[:2] for t in tolerances), strict=True)))
        found = operations.screen(mx.concatenate(slots), proposal, both, tolerance, 1e-7).certain
        assert found.tolist() == alone, seed


def test_masses_are_whole_where_centroids_have_no_biases():
    """Where the rows of a cluster are equal, the cut of top-p is then that of all tokens."""
    rng = np.random.default_rng(2)
    means = rng.normal(size=(60, 16)).astype(np.float32)
    ids = rng.permutation(240).reshape(60, 4)
    rows = np.empty((240, 16), np.float32)
    rows[ids] = means[:, None]
    no_biases = mx.zeros(60), mx.zeros(60)
    centroids = Centroids(Matrix(weight=mx.array(means)), *no_biases)
    operations = PortableOperations(
        ClusteredRows.build(Matrix(weight=mx.array(rows)), ids, centroids)
    )
    settings = InverseCDF(0.7, top_p=0.9)
    for seed in range(40):
        hidden = mx.array(rng.normal(scale=0.35, size=(1, 16)).astype(np.float32))
        key = split((seed, 1))[1]
        draws = Draws.of([(settings, (uniform_bits([key])[0], 0))])
        selection = operations.select(
            operations.route(hidden), 40, False, NO_DEPTH, IDENTITY, None, mass=True
        )
        candidates = operations.score(hidden, selection, IDENTITY)
        token = operations.choose(selection, candidates, draws)[0].item()
        assert token == dense_token((hidden @ mx.array(rows).T)[0], settings, (seed, 1))


# Tokens of equal weight, which one of them is proposed, the number, and how far logits may be off:
# by 0.2 nats the share of one of two tokens may be 0.401, and one of three may begin at 0.427.
EDGES = [
    ((3, 90), 3, 0.5, 1e-6, False),
    ((3, 90), 3, 0.4, 1e-6, True),
    ((3, 90), 90, 0.5, 1e-6, False),
    ((3, 90), 90, 0.6, 1e-6, True),
    ((3, 90), 3, 0.6, 1e-6, False),
    ((3, 90), 3, 0.41, 0.2, False),
    ((3, 90), 3, 0.39, 0.2, True),
    ((3, 90), 90, 0.59, 0.2, False),
    ((3, 90), 90, 0.61, 0.2, True),
    ((3, 90, 140), 90, 0.41, 0.2, False),
    ((3, 90, 140), 90, 0.5, 0.2, True),
    ((3, 90, 140), 90, 0.59, 0.2, False),
]


def is_certain(tokens, proposed, number, doubt, *, top_p=1.0, steps_down=0.0):
    """Whether one of tokens of equal weight is drawn for sure, as all others weigh nothing.

    From one to the next the logits may fall by a little, so that their order is known.
    """
    operations = PortableOperations(plain_clusters(np.random.default_rng(0), 40, 4))
    clustered = operations.clustered
    slots = mx.full((1, clustered.n_clusters, clustered.cluster_size), -60.0)
    ids = to_numpy(clustered.token_ids)
    for i, token in enumerate(tokens):
        cluster, place = np.argwhere(ids == token)[0]
        slots[0, int(cluster), int(place)] = 5.0 - i * steps_down
    probes = mx.argsort(-slots.max(axis=-1), axis=-1)[:, :N_PROBES].astype(mx.uint32)
    logits = mx.take_along_axis(slots, probes[..., None], axis=1)
    tolerance = Tolerance(mx.full((1,), doubt), mx.full((1,), doubt))
    bits = int(np.float32(number).view(np.uint32))
    draws = Draws.of([(InverseCDF(1.0, top_p=top_p), (bits, 0))])
    token = mx.array([proposed], mx.uint32)
    proposal = Proposal(mx.zeros((1, 4)), token, probes, logits, mx.zeros(1))
    return operations.screen(slots, proposal, draws, tolerance, 1e-7).certain.item()


@pytest.mark.parametrize("tokens, proposed, number, doubt, sure", EDGES)
def test_a_number_at_the_edge_of_a_share_is_in_doubt(tokens, proposed, number, doubt, sure):
    assert is_certain(tokens, proposed, number, doubt) is sure


@pytest.mark.parametrize("proposed, sign", [(3, -1), (90, 1)])
def test_log_probabilities_may_be_rounded_together(proposed, sign):
    """Two sums of all exponentials, of which each may lie off by 1e-4: here by 1e-4 of a share."""
    assert not is_certain((3, 90), proposed, 0.5 + sign * 5e-5, 0.0)
    assert is_certain((3, 90), proposed, 0.5 + sign * 4e-4, 0.0)


@pytest.mark.parametrize("more, sure", [(-0.01, True), (-5e-5, False), (5e-5, False), (0.01, True)])
def test_a_sum_near_top_p_leaves_the_last_token_in_doubt(more, sure):
    """It has a fifth of the mass. Without it the others' shares are larger."""
    tokens = (3, 40, 90, 120, 140)
    masses = np.exp(-1e-3 * np.arange(5))
    top_p = masses[:4].sum() / masses.sum() + more
    kept = 5 if more > 0 else 4
    for number, certain in ((0.1, True), (0.9, sure)):
        proposed = tokens[int(number * kept)]
        assert is_certain(tokens, proposed, number, 0.0, top_p=top_p, steps_down=1e-3) is certain


@pytest.mark.parametrize("proposed, sign", [(3, -1), (90, 1)])
def test_the_sums_of_weights_may_be_rounded(proposed, sign, monkeypatch):
    """By 64 spacings of an exponential and one of an addition: 8e-6 of the sum."""
    monkeypatch.setattr(inverse_cdf, "MASS_ROUNDING", 0.0)
    assert not is_certain((3, 90), proposed, 0.5 + sign * 6e-6, 0.0)
    assert is_certain((3, 90), proposed, 0.5 + sign * 1e-5, 0.0)


def test_rows_that_draw_by_noise_are_as_alone():
    """A batch may hold one text whose sampler is mlx-lm's beside others."""
    rng = np.random.default_rng(8)
    operations = PortableOperations(plain_clusters(rng, 300, 4))
    by_noise = Noise(0.8, top_p=0.9)
    slots, proposal, draws, tolerance, _ = case_of(
        rng, operations.clustered, mx.float32, SETTINGS[2], 3.0, 1e-4
    )
    ids = operations.clustered.token_ids[proposal.probes].flatten(1)
    noisy = Draws.of([(by_noise, position_key(4, 0))])
    token = Noise.choose(proposal.logits.flatten(1), noisy, ids)
    both = Draws.of([(SETTINGS[2], tuple(draws.keys[0].tolist())), (by_noise, position_key(4, 0))])
    twice = Proposal(*(mx.concatenate([each, each]) for each in proposal))
    twice = twice._replace(tokens=mx.concatenate([proposal.tokens, token]))
    tolerances = Tolerance(*(mx.concatenate([each, each]) for each in tolerance[:2]))
    found = operations.screen(mx.concatenate([slots, slots]), twice, both, tolerances, 1e-7).certain
    alone = [
        operations.screen(slots, proposal, draws, tolerance, 1e-7).certain.item(),
        operations.screen(
            slots, proposal._replace(tokens=token), noisy, tolerance, 1e-7
        ).certain.item(),
    ]
    assert found.tolist() == alone
