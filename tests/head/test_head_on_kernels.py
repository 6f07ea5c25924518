"""FlashHead on the Metal kernels: positions of any shape, and the path chosen on installation.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import ROUNDING, kernels, make_centroids, make_rows, on_gpu, to_numpy
from mlx_flashhead.head.backend import BACKEND_VARIABLE
from mlx_flashhead.head.draw import Draws, DrawSettings, position_key
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.formats import FORMATS

VOCAB_SIZE, HIDDEN_SIZE, CLUSTER_SIZE, N_CLUSTERS, N_PROBES = 157, 128, 8, 20, 9
UNREAD = [one for one in FORMATS if one.metal is None]
SHAPES = [(), (1, 1), (2, 1), (1, 2), (5, 1), (1, 5), (32, 1), (1, 32), (4, 8), (2, 1, 3)]


def parts(*, bits=4, dtype=mx.float32, mode="affine", group_size=64):
    """Rows, clusters and centroids; three slots are padded."""
    rng = np.random.default_rng(0)
    rows = make_rows(
        rng, VOCAB_SIZE, HIDDEN_SIZE, bits=bits, group_size=group_size, mode=mode, dtype=dtype
    )
    token_ids = rng.permutation(N_CLUSTERS * CLUSTER_SIZE).reshape(N_CLUSTERS, CLUSTER_SIZE)
    centroids = make_centroids(rng, N_CLUSTERS, HIDDEN_SIZE, group_size=64)
    return rows, np.minimum(token_ids, VOCAB_SIZE), centroids


def make_head(backend=None, n_probes=N_PROBES, **form) -> FlashHead:
    settings = {"n_probes": n_probes, "eos_token_ids": (3,), "max_positions": 32}
    return FlashHead(*parts(**form), **settings, backend=backend)


class TestShapes:
    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_every_shape_gives_what_its_positions_give_one_by_one(self, dtype):
        """A position's result depends on nothing beside it: not on B, on L, or on their product."""
        hidden = mx.random.normal((32, HIDDEN_SIZE), key=mx.random.key(1)).astype(dtype)
        # a compiler may contract sums otherwise where positions share a reading of the centroids
        close = {"rtol": 4 * ROUNDING[dtype], "atol": 1e-5}
        with kernels(check=False):
            head = make_head("metal", dtype=dtype)
            assert head.backend == "metal"
            single = [hidden[i : i + 1] for i in range(32)]
            full = np.concatenate([to_numpy(head(h)) for h in single])
            tokens = np.concatenate([to_numpy(head.token(h)) for h in single])
            np.testing.assert_array_equal(tokens, full.argmax(axis=-1))
            assert len(set(tokens.tolist())) > 8
            for shape in SHAPES:
                n_rows = int(np.prod(shape))
                states = hidden[:n_rows].reshape(*shape, HIDDEN_SIZE)
                logits, ids = head(states), head.token(states)
                assert logits.shape == (*shape, VOCAB_SIZE) and ids.shape == shape
                flat = to_numpy(logits).reshape(n_rows, VOCAB_SIZE)
                np.testing.assert_allclose(flat, full[:n_rows], **close)
                np.testing.assert_array_equal(to_numpy(ids).ravel(), tokens[:n_rows])

    def test_a_proposal_is_the_portable_one(self):
        """Token and risk; with a depth the clusters beyond it are not scored."""
        hidden = mx.random.normal((4, HIDDEN_SIZE), key=mx.random.key(2))
        settings = [(), (1.0,), (0.7, 0.8), (2, 1, 0, 5)]
        draws = [(DrawSettings(*s), position_key(1, i)) for i, s in enumerate(settings)]
        with kernels():
            head = make_head("metal")
            for of in (None, Draws.of(draws)):
                found, expected = head.propose(hidden, of), make_head("mlx").propose(hidden, of)
                assert found.tokens.tolist() == expected.tokens.tolist()
                risks = to_numpy(found.risk), to_numpy(expected.risk)
                np.testing.assert_allclose(*risks, rtol=1e-4, atol=1e-5)
            head.depth = 0.0
            near = head.propose(hidden, None)
        lowest = mx.finfo(near.logits.dtype).min
        assert ((near.logits == lowest).sum() > (found.logits == lowest).sum()).item()

    def test_views_with_strides(self):
        """The last of several positions, as generation takes it, and every second feature."""
        states = mx.random.normal((2, 3, 2 * HIDDEN_SIZE), key=mx.random.key(3))
        for view in (states[:, -1:, :HIDDEN_SIZE], states[:, 1, ::2]):
            with kernels():
                head = make_head("metal")
                packed = mx.array(np.array(view))
                np.testing.assert_array_equal(to_numpy(head(view)), to_numpy(head(packed)))
                np.testing.assert_array_equal(head.token(view), head.token(packed))

    def test_kernels_are_left_alone_where_the_head_is_dense(self):
        """More positions than max_positions, all clusters probed, or a dense block."""
        hidden = mx.random.normal((1, 33, HIDDEN_SIZE), key=mx.random.key(4))
        with kernels() as emulator:
            head = make_head("metal")
            exact = make_head("metal", n_probes=N_CLUSTERS)
            dense = head.dense_logits(hidden)
            assert mx.array_equal(head(hidden), dense)
            few = hidden[:, :2]
            assert mx.array_equal(exact(few), exact.dense_logits(few))
            with head.dense():
                assert mx.array_equal(head(few), exact.dense_logits(few))
            assert emulator is None or emulator.dispatches == []


class TestChoice:
    @pytest.mark.skipif(on_gpu(), reason="this machine has Metal")
    @pytest.mark.parametrize("by", ["argument", "environment"])
    def test_metal_where_there_is_none_is_one_clear_sentence(self, monkeypatch, by):
        monkeypatch.setenv(BACKEND_VARIABLE, "metal" if by == "environment" else "mlx")
        with pytest.raises(ValueError) as error:
            make_head("metal" if by == "argument" else None)
        assert str(error.value) == (
            "The FlashHead backend 'metal' needs an Apple GPU and this machine has none: "
            "use backend='mlx' or unset MLX_FLASHHEAD_BACKEND."
        )

    @pytest.mark.parametrize("form", UNREAD, ids=str)
    def test_rows_that_the_kernels_do_not_read(self, monkeypatch, caplog, form):
        """All other steps are kernels; what is slower is said once, not at each token."""
        monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
        hidden = mx.random.normal((1, 2, HIDDEN_SIZE), key=mx.random.key(4))
        stored = {"bits": form.bits, "group_size": form.group_sizes[-1], "mode": form.mode}
        portable = make_head("mlx", **stored)
        with kernels() as emulator:
            head = make_head("metal" if form.bits == 8 else None, **stored)
            close = {"rtol": 1e-5, "atol": 1e-5}
            np.testing.assert_allclose(to_numpy(head(hidden)), to_numpy(portable(hidden)), **close)
            np.testing.assert_array_equal(head.token(hidden), portable.token(hidden))
        assert head.backend == "metal" and f"do not read {form} rows" in head.backend_reason
        assert [record.getMessage() for record in caplog.records] == [head.backend_reason]
        if emulator is not None:
            names = {dispatch.name for dispatch in emulator.dispatches}
            steps = ("route", "select", "select_words", "expand", "sample")
            assert names == {f"flash_head_{step}" for step in steps}
