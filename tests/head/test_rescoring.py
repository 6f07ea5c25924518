"""Changed logits after a second look, against numpy."""

import mlx.core as mx
import numpy as np
import pytest

from head_reference import float64
from kernel_cases import kernels
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.rescoring import LatestCall, rescored
from tiny_models import fitted, random_clusters, random_rows

VOCAB_SIZE, HIDDEN_SIZE, CLUSTER_SIZE, N_CLUSTERS, N_PROBES = 203, 64, 8, 26, 3


def make_head(backend="mlx", **form):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, VOCAB_SIZE, HIDDEN_SIZE, **form)
    token_ids = random_clusters(rng, VOCAB_SIZE, CLUSTER_SIZE)
    centroids = fitted(rows, token_ids)
    head = FlashHead(rows, token_ids, centroids, n_probes=N_PROBES, backend=backend)
    hidden = mx.array(rng.normal(size=(4, HIDDEN_SIZE)).astype(np.float32))
    return head, rows, token_ids, hidden.astype(form.get("dtype", mx.float32))


def called(head, hidden):
    """The call's record, and its logits."""
    latest = LatestCall()
    head.watch(latest)
    logits = head(hidden)
    return latest.call, logits


def changes():
    """What is added to the logits: masks, biases, both and nothing."""
    rng = np.random.default_rng(1)
    few, many = np.full((2, 4, VOCAB_SIZE), -np.inf)
    for row in range(4):
        few[row, rng.choice(VOCAB_SIZE, 10, replace=False)] = 0
        many[row, rng.choice(VOCAB_SIZE, 120, replace=False)] = 0
    bias = rng.normal(scale=8, size=(4, VOCAB_SIZE))
    nothing = np.zeros((4, VOCAB_SIZE))
    return {"few": few, "many": many, "bias": bias, "both": many + bias, "nothing": nothing}


def check(head, rows, token_ids, hidden, change, n_more):
    call, before = called(head, hidden)
    after = before + mx.array(change.astype(np.float32))
    found = rescored(call, before, after, n_more, lambda logits: logits)
    assert found.shape == after.shape and found.dtype == after.dtype
    dense = float64(rows.matmul(hidden)) + change
    cluster_of = np.empty(VOCAB_SIZE + 1, dtype=int)
    cluster_of[token_ids] = np.arange(N_CLUSTERS)[:, None]
    found, after = float64(found), float64(after)
    n_exact = N_PROBES + min(n_more, N_CLUSTERS - N_PROBES)
    for row in range(4):
        mass = np.full(N_CLUSTERS, -np.inf)
        np.logaddexp.at(mass, cluster_of[:VOCAB_SIZE], after[row])
        mass[np.array(call.probes)[row]] = np.inf  # always among them
        last = np.sort(mass)[-n_exact]
        exact = np.isclose(found[row], dense[row], atol=1e-4)
        assert exact[(mass > last + 1e-4)[cluster_of[:VOCAB_SIZE]]].all()
        # of equal clusters any may be the last
        assert len(set(cluster_of[:VOCAB_SIZE][~exact])) <= N_CLUSTERS - n_exact
        best = found[row, exact].max()
        estimate = np.minimum(after[row], best - max(1, abs(best) / 64))
        np.testing.assert_allclose(found[row, ~exact], estimate[~exact], rtol=1e-6)
        assert exact[found[row].argmax()]


@pytest.mark.parametrize("n_more", [1, 5, N_CLUSTERS])
@pytest.mark.parametrize("kind", changes())
def test_second_look(kind, n_more):
    check(*make_head(), changes()[kind], n_more)


@pytest.mark.parametrize("kind", ["few", "both", "nothing"])
def test_on_the_kernels(kind):
    """Of few tokens, most clusters are ruled out altogether: -inf is a score like any other."""
    with kernels():
        head, *rest = make_head("metal")
        assert head.backend == "metal"
        check(head, *rest, changes()[kind], 5)


def test_everything_ruled_out_stays_so():
    head, _, _, hidden = make_head()
    call, before = called(head, hidden)
    nothing = mx.full(before.shape, -mx.inf)
    assert mx.array_equal(rescored(call, before, nothing, 5, lambda logits: logits), nothing)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dtype_stays(dtype):
    head, rows, _, hidden = make_head(dtype=dtype)
    call, before = called(head, hidden)
    found = rescored(call, before, before, N_CLUSTERS, lambda logits: logits)
    assert found.dtype == dtype
    assert mx.allclose(found, rows.matmul(hidden), rtol=4 * mx.finfo(dtype).eps, atol=0.1)


class TestLatestCall:
    def test_holds_the_latest_call_of_any_head_it_watches(self):
        one, *_, hidden = make_head()
        other = one.copy()
        latest = LatestCall()
        one.watch(latest)
        other.watch(latest)
        assert latest.call is None
        for head in (one, other, one):
            head(hidden)
            assert latest.call.head is head

    def test_states_of_prompts_are_not_held(self):
        head, *_, hidden = make_head()
        latest = LatestCall()
        head.watch(latest)
        head(hidden)
        head(mx.zeros((head.max_positions + 1, HIDDEN_SIZE)))
        assert latest.call is None

    @pytest.mark.parametrize("setting", [{"dense": True}, {"draw_temperature": 1.0}])
    def test_no_second_look(self, setting):
        head, *_, hidden = make_head()
        latest = LatestCall()
        head.watch(latest)
        head(hidden)
        with head.settings(**setting):
            head(hidden)
        assert latest.call is None

    def test_nothing_is_held_for_nobody(self):
        head, *_, hidden = make_head()
        latest = LatestCall()
        head.watch(latest)
        assert head.copy()._watchers == () != head._watchers
        del latest
        assert head._watchers == ()
        head(hidden)
