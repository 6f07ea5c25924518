"""Scales and softcaps as numbers: recognised to the last bit, and the same in the kernels."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels, make_clustered, plain_clusters, to_numpy
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy, best_draws
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.logit_map import IDENTITY, LogitMap, all_values, fit_logit_map
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import PortableOperations

FLOAT32 = mx.float32
FORMS = {
    "scale": (lambda x: x * 0.0625, LogitMap(multiplier=0.0625)),
    "odd scale": (lambda x: x * 0.3, LogitMap(multiplier=0.3)),
    "division": (lambda x: x / 7.3, LogitMap(divisor=7.3)),
    "softcap": (lambda x: mx.tanh(x / 30.0) * 30.0, LogitMap(cap=30.0)),
    "cap first": (lambda x: 15.0 * mx.tanh(x / 15.0), LogitMap(cap=15.0)),
    "compiled": (mx.compile(lambda x: mx.tanh(x / 20.0) * 20.0), LogitMap(cap=20.0)),
    "cast, scale and softcap": (
        lambda x: 20.0 * mx.tanh(x.astype(FLOAT32) * 0.25 / 20.0),
        LogitMap(multiplier=0.25, cap=20.0, dtype=FLOAT32),
    ),
}
OTHERS = {
    "cubic": lambda x: x + 1e-3 * x * x * x,
    "sigmoid": lambda x: 30.0 * (mx.sigmoid(x / 10.0) - 0.5),
    "bend": lambda x: mx.where(x > 10.0, 10.0 + (x - 10.0) / 2, x),
    "shift": lambda x: x + 1.0,
    "falling": lambda x: -x,
}
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
MAPS = [
    LogitMap(multiplier=0.3),
    LogitMap(divisor=8.0),
    LogitMap(cap=5.0),
    LogitMap(multiplier=0.5, cap=4.0, dtype=mx.float32),
]


COMPILED = pytest.param("compiled", marks=pytest.mark.compiled)


@DTYPES
@pytest.mark.parametrize("form", [*(form for form in FORMS if form != "compiled"), COMPILED])
def test_a_map_is_recognised_to_the_last_bit(form, dtype):
    """In 16 bits other numbers may be the same map; its values are compared."""
    function, expected = FORMS[form]
    found = fit_logit_map(function, dtype)
    values = all_values(dtype)
    assert found is not None
    assert mx.array_equal(found(values), function(values)).item()
    if dtype == mx.float32:
        numbers = (found.multiplier, found.divisor, found.cap)
        assert numbers == (expected.multiplier, expected.divisor, expected.cap)


@pytest.mark.parametrize("form", OTHERS)
def test_another_form_is_no_map(form):
    assert fit_logit_map(OTHERS[form], mx.float32) is None


@DTYPES
@pytest.mark.parametrize("logit_map", MAPS, ids=str)
def test_the_kernels_map_as_the_operations(logit_map, dtype):
    """In 16 bits all values to the last bit."""
    values = all_values(dtype)
    with kernels(check=False):
        operations = MetalOperations(plain_clusters(np.random.default_rng(0), 40))
        found = to_numpy(operations.mapped(values, logit_map))
    # the kernels write finite values
    highest = mx.finfo(logit_map.result_dtype(dtype)).max
    expected = to_numpy(mx.clip(logit_map(values), -highest, highest))
    np.testing.assert_allclose(found, expected, rtol=logit_map.slack(dtype) / 4, atol=0)


def test_the_inverse_of_a_map():
    logits = mx.array([-20.0, -1.0, 0.0, 3.0, 25.0])
    for logit_map in MAPS[:3]:
        np.testing.assert_allclose(logit_map.inverse(logit_map(logits)), logits, rtol=1e-3)
    assert mx.isfinite(LogitMap(cap=5.0).inverse(mx.array([5.0]))).item()


@DTYPES
@pytest.mark.parametrize("logit_map", MAPS, ids=str)
def test_a_proposal_on_the_kernels_is_the_portable_one(logit_map, dtype):
    """Scored logits, token and risk, greedy and drawn."""
    rng = np.random.default_rng(1)
    settings = [Greedy(), Noise(1.0), Noise(0.7, 0.8), Noise(2, 1, 0, 5)]
    draws = Draws.of([(s, position_key(1, i)) for i, s in enumerate(settings)])
    clustered = make_clustered(rng, 40, 8, 128, padded=3, bits=8, dtype=dtype)
    hidden = mx.array(rng.normal(size=(4, 128)) * 4).astype(dtype)
    with kernels():
        results = []
        for path in (MetalOperations, PortableOperations):
            operations = path(clustered)
            scores = PortableOperations(clustered).route(hidden.astype(mx.float32))
            selection = operations.select(scores, 9, words=False, logit_map=logit_map)
            probes = selection.probes[:, :9]
            if path is PortableOperations:
                order = mx.argsort(probes, axis=-1)
                probes = mx.take_along_axis(probes, order, axis=-1)
                selection = selection._replace(probes=probes)
            candidates = operations.score(hidden, selection, logit_map)
            if path is PortableOperations:
                # The CPU's products of 16 bits are coarse.
                exact = operations.score(hidden.astype(mx.float32), selection).logits
                lowest = mx.finfo(candidates.logits.dtype).min
                logits = logit_map(exact.astype(clustered.rows.logits_dtype(dtype)))
                padded = operations.token_ids(probes) == clustered.vocab_size
                candidates = candidates._replace(logits=mx.where(padded, lowest, logits))
            chosen = [
                operations.choose(selection, candidates, of, logit_map=logit_map)
                for of in (best_draws(4), draws)
            ]
            logits = candidates.logits[:, :9]
            results.append((*selection.unscored, logits, *chosen[0], *chosen[1]))
    found, expected = results
    assert found[2].dtype == logit_map.result_dtype(clustered.rows.logits_dtype(dtype))
    rounding = max(1e-4, 4 * mx.finfo(dtype).eps)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_a_map_adds_no_dispatch(cap):
    """Four kernels of a proposal, and two of a screen, whatever the map."""
    rng = np.random.default_rng(2)
    clustered = make_clustered(rng, 40, 8, 128)
    hidden = mx.array(rng.normal(size=(2, 128))).astype(mx.bfloat16)
    logit_map = IDENTITY
    if cap:
        logit_map = LogitMap(cap=cap)
    with kernels() as emulator:
        operations = MetalOperations(clustered)
        scores = operations.route(hidden)
        selection = operations.select(scores, 9, words=False, logit_map=logit_map)
        candidates = operations.score(hidden, selection, logit_map)
        mx.eval(operations.choose(selection, candidates, best_draws(2), logit_map=logit_map))
    if emulator is not None:
        assert len(emulator.dispatches) == 4
