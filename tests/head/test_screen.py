"""Which proposals are sure to be the dense choice: never wrongly, on both paths; and the cost."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels, on_gpu, plain_clusters, to_numpy
from mlx_flashhead.head.clustered import in_token_order
from mlx_flashhead.head.draws import noise
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy, best_draws
from mlx_flashhead.head.draws.noise import Noise, noise_of_all, position_key
from mlx_flashhead.head.kernel_texts import TALLIED
from mlx_flashhead.head.logit_map import IDENTITY, LogitMap
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import PortableOperations
from mlx_flashhead.head.proposal import Proposal, Tolerance
from test_draw import drawn_token

SETTINGS = [
    Greedy(),
    Noise(1.0),
    Noise(0.6),
    Noise(1.0, top_p=0.9),
    Noise(0.8, top_p=0.5),
    Noise(1.0, top_k=4),
    Noise(1.5, min_p=0.05),
    Noise(1.3, top_p=0.95, min_p=0.01, top_k=20),
]
DRAWS = Draws.of([(settings, position_key(3, i)) for i, settings in enumerate(SETTINGS * 4)])
N_PROBES = 9
BOTH = pytest.mark.parametrize("path", [PortableOperations, MetalOperations])


def operations_of(rng, path=MetalOperations, cluster_size=4, n_clusters=1100):
    """Clusters for more than one threadgroup; two slots are padded."""
    return path(plain_clusters(rng, n_clusters, cluster_size))


def proposal_of(tokens, probes, logits):
    k = len(probes)
    return Proposal(mx.zeros((k, 4)), tokens, probes, logits, mx.zeros(k))


def case_of(
    rng,
    clustered,
    k,
    room,
    scored_room,
    spread,
    dtype=mx.float32,
    draws=None,
    logit_map=IDENTITY,
    relative=0.0,
    bits=None,
):
    """Logits of all slots, a proposal from the best clusters, and the tolerance."""
    slots = rng.normal(size=(k, clustered.n_clusters, clustered.cluster_size)) * spread
    slots = mx.array(slots.astype(np.float32)).astype(dtype)
    order = mx.argsort(-slots.max(axis=-1), axis=-1)
    # These are the best but one of them, so that an unscored token may be the choice.
    probes = mx.sort(mx.concatenate([order[:, :1], order[:, 2 : N_PROBES + 1]], axis=-1), axis=-1)
    exact = mx.random.uniform(-1, 1, slots.shape, key=mx.random.key(int(rng.integers(1000))))
    logits = mx.take_along_axis(slots + (exact * room).astype(dtype), probes[..., None], axis=1)
    logits = logit_map(logits)
    ids = clustered.token_ids[probes]
    logits = mx.where(ids == clustered.vocab_size, mx.finfo(logits.dtype).min, logits)
    if bits is not None:
        may = np.take_along_axis(np.pad(bits, [(0, 0), (0, 1)]), to_numpy(ids.flatten(1)), axis=1)
        logits = mx.where(mx.array(may).reshape(ids.shape), logits, mx.finfo(logits.dtype).min)
    ids = ids.flatten(1)
    flat = logits.astype(mx.float32).flatten(1)
    if draws is None:
        draws = best_draws(k)
    tokens = draws.by_kind(
        (flat, ids), lambda kind, some, given: kind.choose(given[0], some, given[1])
    )
    tolerance = Tolerance(mx.full((k,), room), mx.full((k,), scored_room), relative)
    return slots, proposal_of(tokens, probes, logits), draws, tolerance


def truths(rng, clustered, case, n, logit_map=IDENTITY):
    """Dense logits by token (k, V), within the tolerance: at random, and at its ends."""
    slots, proposal, _, tolerance = case
    slots = to_numpy(slots).astype(np.float64)
    probes = to_numpy(proposal.probes)
    logits = to_numpy(proposal.logits).astype(np.float64)
    slot_of = to_numpy(clustered.slot_of)
    room, scored_room = (to_numpy(each)[:, None, None] for each in tolerance[:2])
    for i in range(n):
        if i == 0:
            # The first one favours all others.
            shift = np.ones(slots.shape)
        elif i % 2:
            shift = rng.uniform(-1, 1, slots.shape)
        else:
            shift = rng.choice([-1, 1], slots.shape)
        off = room + tolerance.relative * np.abs(slots)
        truth = slots + 0.999 * shift * off
        places = (np.arange(len(slots))[:, None], probes)
        truth = to_numpy(logit_map(mx.array(truth.astype(np.float32)))).astype(np.float64)
        off = logit_map.slope * scored_room
        if logit_map.cap:
            # The cap holds the scored logits, too.
            edge = np.arctanh(np.clip(logits / logit_map.cap, -1 + 1e-7, 1 - 1e-7))
            off = off / np.cosh(edge) ** 2 * 0.9
        truth[places] = logits + 0.999 * shift[places] * off
        yield truth.reshape(len(slots), -1)[:, slot_of].astype(np.float32)


MAPS = {
    "no map": IDENTITY,
    "softcap": LogitMap(cap=5.0),
    "scale": LogitMap(multiplier=0.4),
    "division, softcap": LogitMap(divisor=1.7, cap=4.0),
    "steep": LogitMap(multiplier=4.0),
}


@BOTH
@pytest.mark.parametrize("room, scored_room", [(1e-3, 0.0), (0.05, 0.02), (0.5, 0.0)])
@pytest.mark.parametrize("spread", [0.7, 2.0])
def test_what_is_certain_is_the_dense_choice(path, room, scored_room, spread):
    check_certain(path, room, scored_room, spread)


@BOTH
@pytest.mark.parametrize("room, scored_room", [(1e-3, 0.0), (0.05, 0.02)])
@pytest.mark.parametrize("logit_map", list(MAPS)[1:])
def test_what_is_certain_of_mapped_logits_is_the_dense_choice(path, room, scored_room, logit_map):
    check_certain(path, room, scored_room, 2.0, MAPS[logit_map])


@BOTH
@pytest.mark.parametrize("logit_map", ["no map", "softcap"])
def test_a_share_of_each_logit_is_within_the_tolerance(path, logit_map):
    check_certain(path, 1e-3, 0.0, 2.0, MAPS[logit_map], relative=0.01)


@BOTH
@pytest.mark.parametrize("share", [0.5, 0.02])
@pytest.mark.parametrize("logit_map", ["no map", "softcap"])
def test_what_is_masked_is_no_rival(path, share, logit_map):
    """Half of the tokens may be chosen, or few of them."""
    check_certain(path, 1e-3, 0.0, 2.0, MAPS[logit_map], share=share)


def check_certain(path, room, scored_room, spread, logit_map=IDENTITY, relative=0.0, share=None):
    """No proposal that is certain is wrong for any logits within the tolerance."""
    rng = np.random.default_rng(int(spread * 10))
    bits = None
    allowed = None
    k = len(DRAWS.settings)
    with kernels():
        operations = operations_of(rng, path)
        n_tokens = operations.clustered.vocab_size
        if share is not None:
            every = rng.random((k, -(-n_tokens // 32) * 32)) < share
            allowed = mx.array(np.packbits(every, axis=1, bitorder="little").view(np.uint32))
            bits = every[:, :n_tokens]
        case = case_of(
            rng,
            operations.clustered,
            k,
            room,
            scored_room,
            spread,
            draws=DRAWS,
            logit_map=logit_map,
            relative=relative,
            bits=bits,
        )
        certain = np.array(operations.screen(*case, 0.0, logit_map, allowed).certain)
    ids = np.arange(operations.clustered.vocab_size, dtype=np.uint32)
    settings, top_k = (array.tolist() for array in DRAWS.inputs[:2])
    keys = np.array(DRAWS.keys)
    wrong = np.zeros(k, bool)
    for truth in truths(rng, operations.clustered, case, 3, logit_map):
        if bits is not None:
            truth = np.where(bits, truth, np.float32(-1e30))
        for i in range(k):
            drawn = drawn_token(ids, truth[i], -np.inf, settings[i], top_k[i], keys[i])
            wrong[i] |= drawn != case[1].tokens[i].item()
    assert not (wrong & certain).any(), np.flatnonzero(wrong & certain)
    if room < 0.1 and spread == 2.0:
        least = 0.25
        if logit_map.identity and not relative:
            least = 0.5
        assert certain[~wrong].mean() > least


def test_clusters_beyond_the_nearest_may_hold_the_choice(monkeypatch):
    """Of which alone the operations compute the noise, where all draws have filters."""
    monkeypatch.setattr(noise, "NOISY_CLUSTERS", 2)
    rng = np.random.default_rng(7)
    settings = Noise(1.0, top_p=0.999)
    draws = Draws.of([(settings, position_key(3, i)) for i in range(24)])
    operations = operations_of(rng, PortableOperations)
    case = case_of(rng, operations.clustered, 24, 1e-3, 0.0, 0.7, draws=draws)
    certain = np.array(operations.screen(*case, 0.0).certain)
    truth = next(truths(rng, operations.clustered, case, 1))
    gumbel = to_numpy(noise_of_all(draws.keys, operations.clustered.vocab_size))
    # Nearly no token is filtered.
    best = (truth + gumbel).argmax(axis=1)
    assert (best != to_numpy(case[1].tokens)).sum() > 5
    assert not (certain & (best != to_numpy(case[1].tokens))).any()


@BOTH
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_logits_that_a_map_merges_in_16_bits_are_a_doubt(path, dtype):
    """Near a cap two logits of the head become the same one."""
    logit_map = LogitMap(cap=5.0)
    value = 40.0
    with kernels():
        operations = operations_of(np.random.default_rng(3), path)
        shape = (1, *operations.clustered.token_ids.shape)
        slots = mx.zeros(shape, dtype)
        probes = mx.arange(9, dtype=mx.uint32)[None]
        slots[0, 3, 1] = value
        token = operations.clustered.token_ids[3, 1].reshape(1)
        tolerance = Tolerance(mx.zeros(1), mx.zeros(1))
        for other, place, sure in ((30.0, 5, False), (30.0, 50, False), (1.0, 50, True)):
            changed = mx.array(slots)
            changed[0, place, 2] = other
            logits = logit_map(mx.take_along_axis(changed, probes[..., None], axis=1))
            proposal = proposal_of(token, probes, logits)
            screen = operations.screen(changed, proposal, best_draws(1), tolerance, 0.0, logit_map)
            assert screen.certain.tolist() == [sure]


@BOTH
@pytest.mark.parametrize("place", [5, 50], ids=["scored", "not scored"])
@pytest.mark.parametrize(
    "logit_map, relative, doubt",
    [(IDENTITY, 0.0, 0.02), (IDENTITY, 2.0**-7, 0.02 + 4 * 2.0**-7), (MAPS["steep"], 0.0, 0.02)],
)
def test_two_logits_that_may_change_places_are_a_doubt(path, place, logit_map, relative, doubt):
    """Each may lie off by 0.01 before any map, and by a share of it after."""
    with kernels():
        operations = operations_of(np.random.default_rng(3), path)
        shape = (1, *operations.clustered.token_ids.shape)
        probes = mx.arange(9, dtype=mx.uint32)[None]
        token = operations.clustered.token_ids[3, 1].reshape(1)
        tolerance = Tolerance(mx.full((1,), 0.01), mx.full((1,), 0.01), relative)
        for distance, sure in ((0.95 * doubt, False), (1.05 * doubt, True)):
            slots = mx.full(shape, -20.0)
            slots[0, 3, 1] = 2.0
            slots[0, place, 2] = 2.0 - distance
            logits = logit_map(mx.take_along_axis(slots, probes[..., None], axis=1))
            proposal = proposal_of(token, probes, logits)
            screen = operations.screen(slots, proposal, best_draws(1), tolerance, 0.0, logit_map)
            assert screen.certain.tolist() == [sure]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("cluster_size, n_clusters", [(1, 40), (16, 40), (3, 2100)])
def test_the_kernels_say_what_the_portable_operations_say(
    monkeypatch, dtype, cluster_size, n_clusters
):
    """Where filters leave tokens out, the portable ones look at the nearest clusters alone."""
    monkeypatch.setattr(noise, "NOISY_CLUSTERS", 32)
    rng = np.random.default_rng(cluster_size)
    epsilon = 0.0
    if dtype != mx.float32:
        epsilon = mx.finfo(dtype).eps
    with kernels():
        operations = operations_of(rng, MetalOperations, cluster_size, n_clusters)
        plain = PortableOperations(operations.clustered)
        for draws, k in ((DRAWS, 32), (None, 32), (None, 3)):
            case = case_of(rng, operations.clustered, k, 0.01, 0.0, 2.0, dtype, draws)
            found = operations.screen(*case, epsilon)
            expected = plain.screen(*case, epsilon)
            for one, other in zip(found[1:], expected[1:], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            certain = np.array(found.certain)
            by_plain = np.array(expected.certain)
            assert not (by_plain & ~certain).any()
            # Draws without filters are screened alike.
            exact = np.ones(k, bool)
            if draws is not None:
                exact = np.array([not settings.filters for settings in DRAWS.settings[:k]])
            np.testing.assert_array_equal(certain[exact], by_plain[exact])
            assert certain.any()


@BOTH
@pytest.mark.parametrize("better", [2.0, -1.0])
def test_filters_count_what_was_not_scored(path, better):
    """The token of the highest noise, and one that was not scored: a better one leaves it out."""
    settings = [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 1}]
    draws = Draws.of([(Noise(1.0, **each), position_key(3, 1)) for each in settings])
    rng = np.random.default_rng(1)
    k = len(settings)
    with kernels():
        operations = operations_of(rng, path)
        clustered = operations.clustered
        gumbel = noise_of_all(draws.keys, operations.clustered.vocab_size)
        token, other = np.argsort(-to_numpy(gumbel[0]))[[0, 2000]].tolist()
        cluster_of = clustered.slot_of // clustered.cluster_size
        probes = mx.full((k, 9), cluster_of[token].item(), mx.uint32)
        others = [c for c in range(20) if c != cluster_of[other].item()]
        probes[:, 1:] = mx.array(others[:8])
        slots = mx.full((k, clustered.n_clusters * clustered.cluster_size), -30.0)
        slots[:, clustered.slot_of[token]] = 0.0
        slots[:, clustered.slot_of[other]] = better
        slots = slots.reshape(k, *clustered.token_ids.shape)
        logits = mx.take_along_axis(slots, probes[..., None], axis=1)
        proposal = proposal_of(mx.full((k,), token, mx.uint32), probes, logits)
        exact = Tolerance(mx.zeros(k), mx.zeros(k))
        certain = operations.screen(slots, proposal, draws, exact, 0.0).certain
        assert certain.tolist() == [True, *[better < 0] * 3]


@BOTH
def test_unscored_tokens_above_a_rival_leave_it_out(path):
    """The proposed token has less than top-p of the mass, and one of much noise is far below."""
    positions = iter(range(1000))
    with kernels():
        operations = operations_of(np.random.default_rng(1), path)
        clustered = operations.clustered
        gumbel = np.zeros(1)
        while gumbel.max() < 11.5:
            draws = Draws.of([(Noise(1.0, top_p=0.9), position_key(3, next(positions)))])
            gumbel = to_numpy(noise_of_all(draws.keys, clustered.vocab_size)[0])
        order = np.argsort(-gumbel).tolist()
        rival = order[0]
        token = order[2000]
        slots = mx.full((1, clustered.n_clusters * clustered.cluster_size), -30.0)
        slots[:, clustered.slot_of[token]] = 0.0
        slots[:, clustered.slot_of[order[-1]]] = -1.0
        place = clustered.slot_of[token].item() // clustered.cluster_size
        probes = mx.array([[place, *(place + i + 1 for i in range(8))]], mx.uint32)
        for logit, sure in ((gumbel[token] - gumbel[rival] + 0.1, True), (-1.5, False)):
            slots[:, clustered.slot_of[rival]] = float(logit)
            blocks = slots.reshape(1, *clustered.token_ids.shape)
            logits = mx.take_along_axis(blocks, probes[..., None], axis=1)
            proposal = proposal_of(mx.array([token], mx.uint32), probes, logits)
            screen = operations.screen(
                blocks, proposal, draws, Tolerance(mx.zeros(1), mx.zeros(1)), 0.0
            )
            assert screen.certain.tolist() == [sure]


@BOTH
@pytest.mark.parametrize("top_p", [0.79, 0.8 - 5e-5, 0.8 + 5e-5, 0.81])
def test_a_sum_near_top_p_leaves_the_last_token_in_doubt(path, top_p):
    """There another sum of the same probabilities may drop the last token, or keep it."""
    with kernels():
        operations = operations_of(np.random.default_rng(1), path)
        clustered = operations.clustered
        slots = mx.full((1, clustered.n_clusters, clustered.cluster_size), -60.0)
        slots[0, 2, 0], slots[0, 5, 1], slots[0, 7, 2] = np.log([0.5, 0.3, 0.2]).tolist()
        last = clustered.token_ids[7, 2].item()
        n_draws = 200
        slots = mx.broadcast_to(slots, (n_draws, *slots.shape[1:]))
        logits = in_token_order(slots.flatten(1), clustered.slot_of)
        keys = [position_key(0, i) for i in range(n_draws)]
        draws = Draws.of([(Noise(1.0, top_p=top_p), key) for key in keys])
        without = Draws.of([(Noise(1.0), key) for key in keys]).choose(logits)
        probes = mx.broadcast_to(mx.arange(9, dtype=mx.uint32), (n_draws, 9))
        proposal = proposal_of(draws.choose(logits), probes, slots[:, :9])
        exact = Tolerance(mx.zeros(n_draws), mx.zeros(n_draws))
        certain = np.array(operations.screen(slots, proposal, draws, exact, 0.0).certain)
    would_be_last = np.array(without) == last
    assert 20 < would_be_last.sum() < 60
    doubts = np.zeros(n_draws, bool)
    if abs(top_p - 0.8) < 1e-4:
        doubts = would_be_last
    np.testing.assert_array_equal(certain, ~doubts)


@BOTH
def test_a_map_in_float32_may_fail_to_rise(path):
    """By some spacings: two scored logits that lie nearer are a doubt, though they are exact."""
    logit_map = LogitMap(cap=5.0)
    spacing = mx.finfo(mx.float32).eps
    with kernels():
        operations = operations_of(np.random.default_rng(3), path)
        probes = mx.arange(9, dtype=mx.uint32)[None]
        token = operations.clustered.token_ids[3, 1].reshape(1)
        exact = Tolerance(mx.zeros(1), mx.zeros(1))
        for distance, sure in ((6 * spacing, False), (100 * spacing, True)):
            slots = mx.full((1, *operations.clustered.token_ids.shape), -20.0)
            logits = logit_map(slots[:, :9])
            logits[0, 3, 1] = 4.0
            logits[0, 5, 2] = 4.0 * (1 - distance)
            proposal = proposal_of(token, probes, logits)
            found = operations.screen(slots, proposal, best_draws(1), exact, 0.0, logit_map)
            assert found.certain.tolist() == [sure]


@BOTH
@pytest.mark.parametrize("place", [5, 50], ids=["scored", "not scored"])
def test_noise_of_another_implementation_may_decide(path, place):
    """Two logarithms differ in the last digits."""
    with kernels():
        operations = operations_of(np.random.default_rng(1), path)
        clustered = operations.clustered
        draws = Draws.of([(Noise(1.0), position_key(3, 1))])
        gumbel = noise_of_all(draws.keys, clustered.vocab_size)[0]
        token = clustered.token_ids[3, 1]
        rival = clustered.token_ids[place, 2]
        probes = mx.arange(9, dtype=mx.uint32)[None]
        exact = Tolerance(mx.zeros(1), mx.zeros(1))
        for distance, sure in ((5e-6, False), (1e-3, True)):
            slots = mx.full((1, *clustered.token_ids.shape), -60.0)
            slots[0, 3, 1] = 0.0
            slots[0, place, 2] = (gumbel[token] - gumbel[rival]).item() - distance
            proposal = proposal_of(token.reshape(1), probes, slots[:, :9])
            found = operations.screen(slots, proposal, draws, exact, 0.0).certain
            assert found.tolist() == [sure]


@BOTH
def test_nothing_is_certain_where_a_logit_is_nan_or_equal(path):
    rng = np.random.default_rng(1)
    draws = Draws.of([(s, position_key(1, 2)) for s in (SETTINGS[0], SETTINGS[1], SETTINGS[3])])
    with kernels():
        operations = operations_of(rng, path)
        slots, one, *rest = case_of(rng, operations.clustered, 3, 0.0, 0.0, 9.0, draws=draws)

        def certain(value, slots=slots):
            logits = mx.zeros_like(one.logits)
            logits[:, 4, 1] = 1000.0
            logits[:, 5, 1] = value
            proposal = one._replace(logits=logits, tokens=operations.token_ids(one.probes)[:, 4, 1])
            return operations.screen(slots, proposal, *rest, 0.0).certain.tolist()

        assert all(certain(0.0))
        assert not certain(1000.0)[0]
        assert not any(certain(float("nan")))
        # A sum in float16 may overflow midway.
        for value in (float("nan"), -float("inf")):
            worse = mx.array(slots)
            worse[:, min({*range(10)} - {*one.probes[0].tolist()}), 1] = value
            assert not certain(0.0, worse)[0]


@pytest.mark.parametrize("n, n_probes, dispatches", [(1, 9, 1), (8, 9, 1), (9, 9, 0), (3, 7, 0)])
def test_rows_of_proposals_are_joined(n, n_probes, dispatches):
    """In any order, each as often as it is named: as by plain indices."""
    rng = np.random.default_rng(n)
    with kernels() as emulator:
        operations = operations_of(rng, MetalOperations, 16, 40)
        proposals = []
        # Each has three positions.
        for _ in range(n):
            probes = mx.array(rng.integers(40, size=(3, n_probes)), mx.uint32)
            logits = mx.array(rng.normal(size=(3, n_probes, 16))).astype(mx.float16)
            hidden = mx.array(rng.normal(size=(3, 4))).astype(mx.bfloat16)
            proposals.append(Proposal(hidden, None, probes, logits, None))
        some = [(int(i), int(r)) for i, r in rng.integers([n, 3], size=(2 * n, 2))]
        for positions in (some, [(i, r) for i in range(n) for r in range(3)]):
            for path in (operations, PortableOperations(operations.clustered)):
                names = ("hidden", "probes", "logits")
                for name, found in zip(names, path.join(proposals, positions), strict=True):
                    expected = [to_numpy(getattr(proposals[i], name))[r] for i, r in positions]
                    np.testing.assert_array_equal(to_numpy(found), np.stack(expected))
    if emulator is not None:
        assert len(emulator.dispatches) == 2 * dispatches


@pytest.mark.skipif(on_gpu(), reason="counts of the emulator")
@pytest.mark.parametrize("draws", [None, DRAWS], ids=["greedy", "drawn"])
def test_a_verification_reads_the_logits_once(draws):
    rng = np.random.default_rng(2)
    with kernels() as emulator:
        operations = operations_of(rng, MetalOperations, 16, 2100)
        case = case_of(rng, operations.clustered, 32, 0.01, 0.0, 2.0, mx.bfloat16, draws)
        mx.eval(operations.screen(*case, 0.0))
    screen, certain = emulator.dispatches
    assert screen.barriers == 3
    n_barriers = 1 if draws is None else 2
    assert certain.barriers == n_barriers
    assert screen.buffers["slots"].reads == case[0].nbytes
    assert screen.buffers["parts"].bytes == 32 * 3 * TALLIED * 4
    assert certain.buffers["logits"].reads <= 2 * case[1].logits.nbytes
    others = (screen.buffers[name] for name in ("probes", "token_ids", "logits"))
    assert sum(other.distinct_bytes_read for other in others) < 0.1 * case[0].nbytes
