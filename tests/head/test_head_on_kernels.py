"""FlashHead on the Metal kernels: proposals, views, the path chosen, and its trial."""

import pickle
from copy import deepcopy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kernel_cases import changed_kernels, kernels, make_centroids, make_rows, on_gpu
from mlx_flashhead import get_flash_head
from mlx_flashhead.head.backend import BACKEND_VARIABLE
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.greedy import Greedy
from mlx_flashhead.head.draws.noise import Noise, position_key
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.kernel_trial import find_trouble
from mlx_flashhead.head.logit_map import LogitMap
from mlx_flashhead.head.matrix import FORMATS, Matrix
from mlx_flashhead.models.install import install
from recorded_calls import recorded_calls
from retrieval import best_token
from tiny_models import random_clusters

VOCAB_SIZE = 157
HIDDEN_SIZE = 128
CLUSTER_SIZE = 8
N_CLUSTERS = 20
N_PROBES = 9


def parts(*, bits=4, dtype=mx.float32, mode="affine", group_size=64):
    """Rows, clusters and centroids; three slots are padded."""
    rng = np.random.default_rng(0)
    form = {"bits": bits, "group_size": group_size, "mode": mode}
    rows = make_rows(rng, VOCAB_SIZE, HIDDEN_SIZE, dtype=dtype, **form)
    token_ids = random_clusters(rng, VOCAB_SIZE, CLUSTER_SIZE)
    return rows, token_ids, make_centroids(rng, N_CLUSTERS, HIDDEN_SIZE, group_size=64)


def make_head(backend=None, **form) -> FlashHead:
    return FlashHead(*parts(**form), n_probes=N_PROBES, eos_token_ids=(3,), backend=backend)


def states(*shape, key=4) -> mx.array:
    return mx.random.normal((*shape, HIDDEN_SIZE), key=mx.random.key(key))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def test_a_proposal_is_the_portable_one():
    """Token and risk; with a depth the clusters beyond it are not scored."""
    hidden = states(4, key=2)
    settings = [Greedy(), Noise(1.0), Noise(0.7, 0.8), Noise(2, 1, 0, 5)]
    draws = [(s, position_key(1, i)) for i, s in enumerate(settings)]
    with kernels():
        head = make_head("metal")
        for of in (None, Draws.of(draws)):
            found = head.propose(hidden, of)
            expected = make_head("mlx").propose(hidden, of)
            assert found.tokens.tolist() == expected.tokens.tolist()
            np.testing.assert_allclose(found.risk, expected.risk, rtol=1e-4, atol=1e-5)
        near = head.propose(hidden, None, depth=0.0)
    lowest = mx.finfo(near.logits.dtype).min
    assert ((near.logits == lowest).sum() > (found.logits == lowest).sum()).item()


@pytest.mark.skipif(on_gpu(), reason="this machine has Metal")
@pytest.mark.parametrize("argument, variable", [("metal", "mlx"), (None, "metal")])
def test_metal_where_there_is_none_is_one_clear_sentence(monkeypatch, argument, variable):
    monkeypatch.setenv(BACKEND_VARIABLE, variable)
    with pytest.raises(ValueError) as error:
        make_head(argument)
    assert str(error.value) == (
        "The FlashHead backend 'metal' needs an Apple GPU and this machine has none: "
        "use backend='mlx' or unset MLX_FLASHHEAD_BACKEND."
    )


@pytest.mark.parametrize("form", [form for form in FORMATS if form.metal is None], ids=str)
def test_rows_that_the_kernels_do_not_read(caplog, form):
    """All other operations are kernels; what is slower is said once, not at each token."""
    hidden = states(1, 2)
    stored = {"bits": form.bits, "group_size": 128, "mode": form.mode}
    portable = make_head("mlx", **stored)
    with kernels() as emulator:
        backend = "metal" if form.bits == 3 else None
        head = make_head(backend, **stored)
        pair = head.unverified_logits(hidden), portable.unverified_logits(hidden)
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(best_token(head, hidden), best_token(portable, hidden))
    assert head.backend == "metal" and f"do not read {form} rows" in head.backend_reason
    assert [record.getMessage() for record in caplog.records] == [head.backend_reason]
    if emulator is not None:
        names = {dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches}
        assert names == {"route", "select", "select_words", "expand", "sample"}


NOT_FINITE = "returns values that are not finite"
INFINITE = "as_type<float>(0x7f800000u)"
# kernel, what it is said to do, text of the kernels, text in its place
BROKEN = [
    ("route", "does not run on this device", "uint n_hidden,           // R", "uint wrong,"),
    ("route", NOT_FINITE, "to_finite<float>(totals[", f"({INFINITE} + totals["),
    ("route", "differs", "chunk < uint(Rows::CHUNKS)", "chunk + 1 < uint(Rows::CHUNKS)"),
    ("route", NOT_FINITE, "size_t(position + h) * C", "size_t(position) * C"),
    ("select", "differs", "(best - score) *", "fabs(score) *"),
    ("select", "differs", "edge + log(mass)", "edge + mass"),
    ("score", "differs", "slot = size_t(cluster) * N + first", "slot = size_t(cluster) * N"),
    ("score", "differs", "    best[probe] = score_of(highest);", "    best[probe] = 1.0f;"),
    ("expand", "differs", "slot % N]", "(slot + 1) % N]"),
    ("sample", "differs", "+ i / N]) * N + i % N", "+ i / N]) * N + (N - 1 - i % N)"),
    ("sample", "differs", "{top_p * mass,", "{0.1f * mass,"),
    ("sample", "differs", "fit[2] / (1.0f + odds)", "fit[2] / (2.0f + odds)"),
    ("join", "differs", "source[size_t(from) * n + i]", "source[size_t(from) * n + (i ^ 1)]"),
    ("screen", "differs", "mapped_token<Map>(x, tol", "mapped_token<Map>(x + 1.0f, tol"),
    ("certain", "differs", "known[3 * state] = others.largest;", "known[3 * state] = 0.0f;"),
    ("tolerance", "differs", "sum += x * x;", "sum += fabs(x);"),
]
# A pipeline that allows so many threads allows too few for any form of the kernel. The kernels are
# in the order in which they are built.
REFUSED = {
    "route": 63,
    "select": 255,
    "select_words": 192,
    "score": 32,
    "expand": 255,
    "sample": 128,
    "join": 255,
    "tolerance": 255,
    "screen": 255,
    "certain": 255,
    "select_forced": 255,
    "adjust": 255,
}
# For these 256 are enough.
FEWER = {"select": 448, "select_words": 448, "sample": 480, "certain": 511}


class OnlyHead(nn.Module):
    """An embedding, and an output projection that the head is installed on."""

    def __init__(self, dtype=mx.float32):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.embed.weight = states(VOCAB_SIZE, key=0)
        self.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        self.lm_head.weight = parts(bits=32)[0].weight
        self.set_dtype(dtype)

    def __call__(self, ids, cache=None):
        return self.lm_head(self.embed(ids))


def install_on(model, **settings):
    return install(model, *parts()[1:], n_probes=N_PROBES, eos_token_ids=(3,), **settings)


def check_falls_back(caplog, kernel, said):
    """The portable path is taken, which is said once, and gives the logits it always gives."""
    ids = mx.array([[5, 7, 11]])
    expected = OnlyHead()
    model = OnlyHead()
    install_on(expected, backend="mlx")
    head = install_on(model)
    np.testing.assert_allclose(model(ids), expected(ids), atol=1e-5)
    sentence = head.backend_reason
    assert head.backend == "mlx" and f"the kernel '{kernel}' {said}" in sentence
    assert [record.getMessage() for record in caplog.records] == [sentence]
    again = pickle.loads(pickle.dumps(head))
    assert (again.backend, again.backend_reason) == ("mlx", sentence)
    assert "please report this as an issue, with the output of `mlx_flashhead.bench" in sentence
    assert sentence.startswith("FlashHead takes MLX's own operations instead of its Metal kernels")
    assert "\n" not in sentence and sentence.endswith(".")


@pytest.mark.skipif(on_gpu(), reason="kernels are broken on the emulator only")
class TestBroken:
    @pytest.mark.parametrize("kernel, said, right, wrong", BROKEN)
    def test_a_broken_kernel_is_replaced(self, caplog, kernel, said, right, wrong):
        with changed_kernels(right, wrong), kernels(check=False):
            check_falls_back(caplog, kernel, said)

    @pytest.mark.parametrize("kernel", REFUSED)
    def test_a_refused_pipeline_is_replaced(self, caplog, kernel):
        """As by a device that allows fewer threads, since a kernel takes many registers."""
        with kernels(max_threads={f"flash_head_{kernel}": REFUSED[kernel]}, check=False):
            check_falls_back(caplog, kernel, "does not run on this device (Thread group size")

    @pytest.mark.parametrize("kernel", FEWER)
    def test_a_pipeline_with_fewer_threads_gets_smaller_threadgroups(self, caplog, kernel):
        """The head stays on the kernels, with the same choices."""
        settings = [Greedy(), Noise(0.8, top_p=0.9), Noise(1.5, top_k=9)]
        draws = Draws.of([(each, position_key(1, i)) for i, each in enumerate(settings)])
        hidden = states(len(settings))
        with kernels(max_threads={f"flash_head_{kernel}": FEWER[kernel]}, check=False):
            portable = install_on(OnlyHead(), backend="mlx")
            head = install_on(OnlyHead())
            assert (head.backend, head.operations.row_threads) == ("metal", 256)
            assert not caplog.records
            for of in (None, draws):
                found, expected = (each.propose(hidden, of) for each in (head, portable))
                assert found.tokens.tolist() == expected.tokens.tolist()
                np.testing.assert_allclose(found.risk, expected.risk, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("argument, variable", [("metal", "mlx"), (None, "metal")])
    def test_metal_by_name_does_not_fall_back(self, monkeypatch, argument, variable):
        kernel, _, right, wrong = BROKEN[0]
        model = OnlyHead()
        weight = model.lm_head.weight
        monkeypatch.setenv(BACKEND_VARIABLE, variable)
        refused = pytest.raises(ValueError, match=f"used: the kernel '{kernel}'.*backend='mlx'")
        with changed_kernels(right, wrong), kernels(check=False), refused:
            install_on(model, backend=argument)
        assert get_flash_head(model) is None and type(model.lm_head) is nn.Linear
        assert mx.array_equal(model.lm_head.weight, weight)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_sound_kernels_pass_and_are_built(dtype, caplog, monkeypatch):
    """Later neither a call nor a new environment chooses the path again, or makes kernels anew."""
    model = OnlyHead(dtype)
    ids = mx.array([[5, 7, 11]])
    with kernels(check=False) as emulator:
        head = install_on(model)
        assert head.backend == "metal" and not caplog.records
        if emulator is not None:
            names = [dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches]
            assert list(dict.fromkeys(names)) == list(REFUSED)
            built = set(emulator.built)
        first = model(ids)
        monkeypatch.setenv(BACKEND_VARIABLE, "mlx")
        for owner, name in ((mx.fast, "metal_kernel"), (mx.metal, "is_available")):
            monkeypatch.setattr(owner, name, pytest.fail)
        assert mx.array_equal(model(ids), first) and model(ids[:, :1]).size == VOCAB_SIZE
        assert deepcopy(head).backend == head.backend == "metal"
        monkeypatch.undo()
        assert emulator is None or emulator.built == built


def test_with_a_map_the_kernel_that_fails_is_named_too(monkeypatch):
    """What it gives is looked at before the next kernel takes it."""
    with kernels(check=False):
        operations = make_head("metal").operations
        route = operations.route
        monkeypatch.setattr(operations, "route", lambda hidden: route(hidden) * mx.nan)
        trouble = find_trouble(operations, mx.float32, N_PROBES, LogitMap(cap=30.0))
    assert trouble == f"the kernel 'route' {NOT_FINITE}"


@pytest.mark.skipif(on_gpu(), reason="GPUs are only named here")
@pytest.mark.parametrize(
    "architecture, dtype, taken",
    [
        ("applegpu_g13s", mx.bfloat16, True),
        ("applegpu_g15p", mx.bfloat16, False),
        ("", mx.bfloat16, False),
        ("applegpu_g13s", mx.float32, False),
    ],
)
def test_verifications_are_in_float16_where_a_gpu_lacks_bfloat16(
    monkeypatch, architecture, dtype, taken
):
    """From six states on, and nothing else; the logits keep their dtype."""
    monkeypatch.setattr(mx, "device_info", lambda *_: {"architecture": architecture})
    with kernels(check=False):
        head = make_head("metal", dtype=dtype)
        head.check_kernels(dtype)
        calls = recorded_calls(monkeypatch, Matrix, "matmul")
        hidden = states(6, key=5).astype(dtype)
        many = head.operations.verifying_product(hidden)
        few = head.operations.verifying_product(hidden[:5])
        head.dense_logits(hidden)
    dtypes = [multiplied.dtype for _, multiplied in calls]
    if taken:
        assert dtypes == [mx.float16, dtype, dtype]
    else:
        assert dtypes == [dtype, dtype, dtype]
    assert many.dtype == few.dtype == dtype
