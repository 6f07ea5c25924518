"""The trial of the kernels when a head is installed: each kernel broken in each way."""

import logging
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kernel_cases import changed_kernels, kernels, make_centroids, make_rows, on_gpu, to_numpy
from mlx_flashhead import get_flash_head
from mlx_flashhead.head.backend import BACKEND_VARIABLE
from mlx_flashhead.models.install import install

VOCAB_SIZE, HIDDEN_SIZE, N_CLUSTERS, N_PROBES = 157, 128, 20, 9
NOT_FINITE = "returns values that are not finite"
INFINITE = "as_type<float>(0x7f800000u)"
# kernel, what it is said to do, text of the kernels, text in its place
BROKEN = [
    ("route", "does not run on this device", "uint n_hidden,           // R", "uint wrong,"),
    ("select", "does not run on this device", "popcount(are_better);", "no_such(are_better);"),
    ("route", NOT_FINITE, "to_finite<float>(totals[", f"({INFINITE} + totals["),
    ("score", NOT_FINITE, "to_finite<T>(logit)", f"T({INFINITE})"),
    ("expand", NOT_FINITE, "to_finite<T>(tail)", f"T({INFINITE})"),
    ("route", "differs", "chunk < uint(Rows::CHUNKS)", "chunk + 1 < uint(Rows::CHUNKS)"),
    ("route", NOT_FINITE, "size_t(position + h) * C", "size_t(position) * C"),
    ("select", "differs", "(best - score) *", "fabs(score) *"),
    ("select", "differs", "edge + log(mass)", "edge + mass"),
    ("score", "differs", "slot = size_t(cluster) * N + first", "slot = size_t(cluster) * N"),
    ("score", "differs", "= score_of(highest);", "= score_of(highest) + 1.0f;"),
    ("expand", "differs", "slot % N]", "(slot + 1) % N]"),
    ("expand", "differs", "|| estimate < cap", "|| estimate > cap"),
    ("sample", "differs", "+ i / N]) * N + i % N", "+ i / N]) * N + (N - 1 - i % N)"),
    ("sample", "differs", "key_0 + token / 2", "key_0 + token"),
    ("sample", "differs", "{top_p * mass,", "{0.1f * mass,"),
    ("sample", "differs", "fit[2] / (1.0f + odds)", "fit[2] / (2.0f + odds)"),
    ("sample", "differs", "float(n_top)}", "float(n_top) * 9.0f}"),
]
REFUSED = {
    "route": 63, "select": 448, "select_words": 448, "score": 32, "expand": 255, "sample": 480,
}  # fmt: skip


class OnlyHead(nn.Module):
    """An embedding, and an output projection that the head is installed on."""

    def __init__(self, dtype=mx.float32):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.embed.weight = mx.random.normal((VOCAB_SIZE, HIDDEN_SIZE), key=mx.random.key(0))
        self.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        rng = np.random.default_rng(0)
        rows = make_rows(rng, VOCAB_SIZE, HIDDEN_SIZE, bits=32, group_size=0, dtype=mx.float32)
        self.lm_head.weight = rows.weight
        self.set_dtype(dtype)

    def __call__(self, ids, cache=None):
        return self.lm_head(self.embed(ids))


def install_on(model, **settings):
    rng = np.random.default_rng(1)
    token_ids = rng.permutation(N_CLUSTERS * 8).reshape(N_CLUSTERS, 8)
    centroids = make_centroids(rng, N_CLUSTERS, HIDDEN_SIZE, group_size=64)
    token_ids = np.minimum(token_ids, VOCAB_SIZE)
    return install(model, token_ids, centroids, n_probes=N_PROBES, eos_token_ids=(3,), **settings)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def check_falls_back(caplog, kernel, said):
    """The portable path is taken, which is said once, and gives the logits it always gives."""
    ids, expected, model = mx.array([[5, 7, 11]]), OnlyHead(), OnlyHead()
    install_on(expected, backend="mlx")
    with caplog.at_level(logging.WARNING):
        head = install_on(model)
        np.testing.assert_allclose(to_numpy(model(ids)), to_numpy(expected(ids)), atol=1e-5)
    assert head.backend == "mlx" and f"the kernel '{kernel}' {said}" in head.backend_reason
    (record,) = caplog.records
    assert record.getMessage() == head.backend_reason
    again = pickle.loads(pickle.dumps(head))
    assert (again.backend, again.backend_reason) == ("mlx", head.backend_reason)
    sentence = head.backend_reason
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
        with kernels(max_threads={f"flash_head_{kernel}": REFUSED[kernel]}):
            check_falls_back(caplog, kernel, "does not run on this device (Thread group size")

    @pytest.mark.parametrize("by, broken", [("argument", BROKEN[0]), ("environment", BROKEN[3])])
    def test_metal_by_name_does_not_fall_back(self, monkeypatch, by, broken):
        """The model stays as it was."""
        kernel, _, right, wrong = broken
        model = OnlyHead()
        weight = to_numpy(model.lm_head.weight)
        if by == "environment":
            monkeypatch.setenv(BACKEND_VARIABLE, "metal")
        said = f"cannot be used: the kernel '{kernel}'.*backend='mlx'"
        refused = pytest.raises(ValueError, match=said)
        with changed_kernels(right, wrong), kernels(check=False), refused:
            install_on(model, backend="metal" if by == "argument" else None)
        assert get_flash_head(model) is None and type(model.lm_head) is nn.Linear
        np.testing.assert_array_equal(to_numpy(model.lm_head.weight), weight)


def test_the_path_is_chosen_once_on_installation(monkeypatch):
    """Neither a call nor a new environment chooses again, or makes kernels anew."""
    model, ids = OnlyHead(), mx.array([[5, 7, 11]])
    with kernels():
        head = install_on(model)
        first = to_numpy(model(ids))
        with monkeypatch.context() as patch:
            patch.setenv(BACKEND_VARIABLE, "mlx")
            for owner, name in ((mx.fast, "metal_kernel"), (mx.metal, "is_available")):
                patch.setattr(owner, name, pytest.fail)
            np.testing.assert_array_equal(to_numpy(model(ids)), first)
            assert head.copy().backend == head.backend == "metal"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_sound_kernels_pass_and_are_built(dtype, caplog):
    """Each once, but route has another one for several positions, and sample for draws."""
    model = OnlyHead(dtype)
    with kernels() as emulator:
        head = install_on(model)
        assert head.backend == "metal" and not caplog.records
        if emulator is not None:
            names = [dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches]
            assert list(dict.fromkeys(names)) == list(REFUSED)
            built = set(emulator.built)
            assert len(built) == 8
        mx.eval(model(mx.array([[5]])), model(mx.array([[5, 6]])))
        if emulator is not None:
            assert emulator.built == built
