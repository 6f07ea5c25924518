"""The draw of a token: which remain, how often each is drawn, and the kernel by the same noise."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

from kernel_cases import kernels, plain_clusters, to_numpy
from mlx_flashhead import make_sampler
from mlx_flashhead.head.draws import filters
from mlx_flashhead.head.draws.bounds import log_mass
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy, best_draws
from mlx_flashhead.head.draws.inverse_cdf import InverseCDF
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.kernel_inputs import MIN_PROBES, UNSCORED
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import PortableOperations
from mlx_flashhead.head.proposal import Candidates, Selection, Unscored

# The definition, in numpy; see metal/flash_head/sample.h.
uniforms = mx.vmap(lambda key: mx.random.uniform(shape=(2,), key=key))


def noise(ids: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Gumbel noise (K,) of token ids (K,): two tokens share a key, counted from the position's."""
    keys = np.stack([key[0] + ids // 2, np.full_like(ids, key[1])], axis=-1)
    pairs = np.array(uniforms(mx.array(keys)))
    drawn = pairs[np.arange(len(ids)), ids % 2]
    return -np.log(-np.log(drawn))


def kept(logits: np.ndarray, tail: float, top_p: float, log_min_p: float, top_k: int):
    """Which of the scored tokens (K,) may be drawn: bool (K,). ``tail``: of the others, a log."""
    x = logits.astype(np.float64)
    mass = np.exp(x - x.max())
    every = mass.sum() + np.exp(tail - x.max())
    order = np.argsort(-x, kind="stable")
    # So many are strictly above.
    place = np.searchsorted(-x[order], -x, side="left")
    above = np.concatenate([[0], np.cumsum(mass[order])])[place]
    keep = logits >= np.float32(logits.max() + np.float32(log_min_p))
    if top_p < 1:
        keep &= above < top_p * every
    if top_k:
        keep &= place < top_k
    return keep


def drawn_token(ids: np.ndarray, logits: np.ndarray, tail: float, setting, top_k: int, key) -> int:
    """The token of one position, of those with ids (K,) and float32 logits (K,).

    ``tail`` is the logarithm of the others' mass, ``setting`` 1/temperature, top_p and log_min_p.
    """
    scale, top_p, log_min_p = map(np.float32, setting)
    if np.isnan(logits).any():
        return int(ids[np.isnan(logits)].min())
    if scale == 0:
        return int(ids[logits == logits.max()].min())
    values = logits * scale + noise(ids, key)
    values[~kept(logits, tail, top_p, log_min_p, top_k)] = -np.inf
    return int(ids[values == values.max()].min())


# They take temperature, top_p, min_p and top_k.
SETTINGS = [Greedy(), Greedy(0.0, 0.5, 0.05, 3)]
SETTINGS += [Noise(1.0), Noise(0.8), Noise(2.5)]
SETTINGS += [Noise(1.0, 0.1), Noise(1.0, 0.5), Noise(0.8, 0.95), Noise(2.0, 0.999)]
SETTINGS += [Noise(3.0, 1.0, 0.05), Noise(3.0, 1.0, 1.0)]
SETTINGS += [Noise(3.0, 1.0, 0.0, 1), Noise(3.0, 1.0, 0.0, 5), Noise(3.0, 1.0, 0.0, 100_000)]
SETTINGS += [Noise(3.0, 0.9, 0.05, 20), Noise(3.0, 0.7, 0.0, 40), Noise(20.0, 0.99, 1e-4, 64)]


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("n_logits", [1, 5, 203])
@pytest.mark.parametrize("spread, digits", [(0.1, 9), (1, 1), (4, 9)])
def test_the_threshold_is_the_definitions(monkeypatch, halved, n_logits, spread, digits):
    """Of logits that are sorted, and of more, which are halved until so few are left."""
    if halved:
        monkeypatch.setattr(filters, "SORTED", 4)
    rng = np.random.default_rng(n_logits)
    logits = rng.normal(scale=spread, size=(len(SETTINGS), n_logits)).astype(np.float32)
    logits = np.round(logits, digits)
    # A mask rules these out.
    logits[:, 3::5] = -np.inf
    draws = Draws.of([(s, (0, 0)) for s in SETTINGS])
    given = mx.array(logits)
    # The mass of tokens that are not among these is none, or exp(0.5).
    for tail, total in (
        (-np.inf, None),
        (0.5, mx.logaddexp(log_mass(given), mx.array(0.5))),
    ):
        found = np.array(given >= filters.threshold(given, draws, total))
        settings, top_k = (array[: len(SETTINGS)].tolist() for array in draws.inputs[:2])
        each = zip(found, logits, settings, top_k, strict=True)
        for keeps, x, (_, top_p, log_min_p), top_k in each:
            expected = kept(x, tail, top_p, log_min_p, top_k)
            np.testing.assert_array_equal(keeps[x > -np.inf], expected[x > -np.inf])


@pytest.mark.parametrize(
    "arguments",
    [
        {"temp": 1.0},
        {"temp": 0.8, "top_p": 0.9},
        {"temp": 1.5, "min_p": 0.2},
        {"temp": 2.0, "top_p": 0.95, "min_p": 0.05, "top_k": 9},
    ],
)
def test_tokens_are_drawn_as_often_as_by_mlx_lms_sampler(arguments):
    rng = np.random.default_rng(4)
    n_draws = 20_000
    n_tokens = 12
    logits = mx.array(rng.normal(scale=1.5, size=(1, n_tokens)).astype(np.float32))
    repeated = mx.repeat(logits - log_mass(logits), n_draws, axis=0)
    settings = make_sampler(**arguments).settings
    draws = Draws.of([(settings, position_key(3, i)) for i in range(n_draws)])
    mx.random.seed(0)
    ours = np.bincount(draws.choose(repeated), minlength=n_tokens)
    theirs = np.bincount(sample_utils.make_sampler(**arguments)(repeated), minlength=n_tokens)
    assert ((ours == 0) == (theirs == 0)).all()
    samples = rng.multinomial(n_draws, (ours + theirs) / (2 * n_draws), size=(2, 200))
    distances = np.abs(samples[0] - samples[1]).sum(axis=1)
    farthest = distances.mean() + 5 * distances.std()
    assert np.abs(ours - theirs).sum() < farthest


def scored(rng, operations, n_positions, n_probes, dtype, ties=False):
    """A selection of ``n_probes`` clusters of each position, and random logits of their tokens."""
    clustered = operations.clustered
    order = rng.permuted(np.tile(np.arange(clustered.n_clusters), (n_positions, 1)), axis=1)
    probes = mx.array(np.sort(order[:, :n_probes]).astype(np.uint32))
    held = mx.minimum(mx.arange(max(n_probes, MIN_PROBES)), n_probes - 1)
    logits = rng.normal(scale=3.0, size=(*probes.shape, clustered.cluster_size))
    if ties:
        logits = np.round(logits)
    logits = mx.array(logits).astype(dtype)
    padded = clustered.token_ids[probes] == clustered.vocab_size
    logits = mx.where(padded, mx.finfo(dtype).min, logits)[:, held]
    tail = [mx.array(rng.normal(size=(n_positions, 1)).astype(np.float32)) for _ in range(2)]
    return Selection(probes[:, held], **left(*tail)), candidates_of(logits)


def left(best, mass):
    """What was not scored, and the same for a kernel."""
    zeros = mx.zeros((len(best), UNSCORED - 2))
    given = mx.concatenate([best, mass, zeros], axis=1)
    return {"unscored": Unscored(best, mass), "unscored_input": given}


def candidates_of(logits):
    return Candidates(logits, mx.max(logits, axis=-1).astype(mx.float32))


def with_keys(rng, settings):
    keys = rng.integers(2**32, size=(len(settings), 2)).tolist()
    return Draws.of([(each, tuple(key)) for each, key in zip(settings, keys, strict=True)])


def expected(operations, selection, candidates, inputs):
    """The tokens by the definition; ``inputs`` are the kernels': settings, top_k, keys."""
    ids = to_numpy(operations.clustered.token_ids)[to_numpy(selection.probes)]
    logits = to_numpy(candidates.logits).astype(np.float32)
    real = ids < operations.clustered.vocab_size
    # Probes that are repeated count once.
    real[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    masses = to_numpy(selection.unscored.mass)[:, 0]
    settings, top_k, keys = (to_numpy(array)[: len(ids)] for array in inputs)
    return [
        drawn_token(ids[i, real[i]], logits[i, real[i]], masses[i], settings[i], top_k[i], keys[i])
        for i in range(len(ids))
    ]


@pytest.mark.parametrize(
    "dtype, cluster_size",
    [(mx.float32, 1), (mx.float32, 16), (mx.float16, 8), (mx.bfloat16, 1), (mx.bfloat16, 16)],
    ids=str,
)
def test_the_token_is_the_definitions(dtype, cluster_size):
    """Draws of all settings at once, and a few, whose arrays MLX passes in `constant`."""
    rng = np.random.default_rng(cluster_size)
    with kernels():
        operations = MetalOperations(plain_clusters(rng, 50, cluster_size))
        for n_probes, ties in ((1, False), (7, True), (8, False), (40, False), (40, True)):
            for part in (slice(None), slice(7, 8), slice(14, 17), slice(6, 11)):
                drawing = with_keys(rng, SETTINGS[part])
                case = scored(rng, operations, len(drawing.settings), n_probes, dtype, ties=ties)
                tokens, _ = operations.choose(*case, drawing)
                assert tokens.tolist() == expected(operations, *case, drawing.inputs)
            greedy = operations.choose(*case, best_draws(len(drawing.settings)))[0].tolist()
            zeros = mx.zeros_like(drawing.inputs[0])
            assert greedy == expected(operations, *case, (zeros, *drawing.inputs[1:]))


def test_draws_of_all_kinds_are_chosen_as_alone():
    """In one batch, in any order."""
    rng = np.random.default_rng(6)
    number = int(np.float32(0.4).view(np.uint32))
    positions = [
        (InverseCDF(0.7, top_p=0.9), (number, 0)),
        (Greedy(), (0, 0)),
        (Noise(1.0), (3, 4)),
        (InverseCDF(1.2), (number, 0)),
        (Greedy(), (0, 0)),
        (Noise(0.8, top_p=0.9, top_k=30), (5, 6)),
        (Noise(1.5), (7, 8)),
    ]
    operations = PortableOperations(plain_clusters(rng, 50, 8))
    selection, candidates = scored(rng, operations, len(positions), 9, mx.float32)
    tokens, risks = operations.choose(selection, candidates, Draws.of(positions))
    for i, position in enumerate(positions):
        one = slice(i, i + 1)
        alone = Selection(
            selection.probes[one], **left(*(each[one] for each in selection.unscored))
        )
        token, risk = operations.choose(
            alone, Candidates(candidates.logits[one]), Draws.of([position])
        )
        assert tokens[i].item() == token.item(), position
        assert risks[i].item() == pytest.approx(risk.item()), position


def test_values_without_order():
    """NaN, of which the lowest id wins; all logits saturated; a mass that the others hold."""
    rng = np.random.default_rng(3)
    with kernels():
        operations = MetalOperations(plain_clusters(rng, 50, 8))
        selection, candidates = scored(rng, operations, 3, 9, mx.float32)
        logits = candidates.logits
        logits[0, 3, 2] = float("nan")
        logits[0, 5, 1] = float("nan")
        logits[1] *= 1e30
        tail = mx.array([[0.0], [0.0], [1e30]]), mx.array([[0.0], [0.0], [700.0]])
        case = selection._replace(**left(*tail)), candidates_of(logits)
        drawing = with_keys(rng, [Noise(1.0, 0.9, top_k=4)] * 3)
        found = operations.choose(*case, drawing)[0].tolist()
    ids = to_numpy(operations.clustered.token_ids)[to_numpy(selection.probes)]
    assert found == expected(operations, *case, drawing.inputs)
    assert found[0] == ids[0][[3, 5], [2, 1]].min()
