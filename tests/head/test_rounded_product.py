"""How far two ways of computing a logit may lie apart: each bound against a simulation of it."""

import pickle
from copy import deepcopy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flash_loops import make_flash
from kernel_cases import make_rows
from mlx_flashhead.head import rounded_product, same_sums
from mlx_flashhead.head.dense_kernels import DenseKernel
from mlx_flashhead.head.margins import FLOAT32, TF32
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.operations import Candidates
from mlx_flashhead.head.rounded_product import CLASSES, N_STATES, RoundedSums
from recorded_calls import recorded_calls
from tf32 import in_tf32


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize("hidden_size", [64, 576, 1024, 2048])
def test_tf32_lies_within_its_bound(hidden_size, cut_off):
    rng = np.random.default_rng(hidden_size)
    states, rows = rng.normal(size=(2, 200, hidden_size)).astype(np.float32)
    # All products have one sign.
    rows[0] = states[0]
    # This is the most that is cut off.
    states[1] = 1 + 2.0**-10 - 2.0**-23
    rows[1] = states[1]
    # This is the most that is rounded.
    states[2] = 1 + 2.0**-11
    rows[2] = states[2]
    exact = states.astype(np.float64) @ rows.T.astype(np.float64)
    found = in_tf32(states, cut_off).astype(np.float64) @ in_tf32(rows, cut_off).T
    lengths = np.linalg.norm(states, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    shares = np.abs(found - exact) / lengths
    assert shares.max() <= TF32
    # Half the bound would be exceeded.
    assert shares.max() > TF32 / 2.1


@pytest.mark.parametrize(
    "architecture, expected",
    [("applegpu_g13g", False), ("applegpu_g16s", False), ("applegpu_g17s", True), (None, True)],
)
def test_machines_that_may_use_tf32(monkeypatch, architecture, expected):
    # This is a CPU.
    assert not rounded_product.may_use_tf32()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert rounded_product.may_use_tf32() == expected
    rows = make_rows(np.random.default_rng(0), 9000, 64, bits=8, group_size=64, dtype=mx.float32)
    shares = [rounded_product._coarser(rows, 9000, mx.float32, n) for n in (1, 2, 32)]
    if expected:
        assert shares == [0.0, TF32, TF32]
    else:
        assert shares == [0.0, 0.0, 0.0]
    # Rows of few bits are made of 16 bits first.
    half = mx.finfo(mx.bfloat16).eps / 2
    assert rounded_product._coarser(rows, 9000, mx.bfloat16, 2) == half


def test_sums_of_several_states_are_cut_for_few_rows_alone(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    rows = make_rows(np.random.default_rng(0), 64, 64, bits=4, group_size=64, dtype=mx.bfloat16)
    half = mx.finfo(mx.bfloat16).eps / 2
    for version, times in (((0, 32, 3), [17, 3, 1, 1]), ((0, 32, 4), [1, 1, 1, 1])):
        monkeypatch.setattr(rounded_product, "mlx_version", lambda version=version: version)
        sizes = 1024, 8192, 8224, 32000
        shares = [rounded_product._coarser(rows, n_rows, mx.bfloat16, 2) for n_rows in sizes]
        assert shares == [half * each for each in times]
        floats = Matrix(mx.zeros((1, 64), mx.bfloat16))
        assert rounded_product._coarser(floats, 1024, mx.bfloat16, 2) == 0


@pytest.fixture(autouse=True)
def _few_logits_are_enough(monkeypatch):
    """The scored logits of these small vocabularies may be the dense ones, too."""
    monkeypatch.setattr(same_sums, "ENOUGH_LOGITS", 600)


@pytest.fixture
def flash():
    return make_flash(num_hidden_layers=1, dtype=mx.bfloat16)


def test_scored_logits_are_compared_on_all_clusters(flash, monkeypatch):
    """One that differs, wherever it is, gives all of them a tolerance."""
    head = flash.head
    assert head.measure_rounding(mx.bfloat16)[N_STATES].scored == 0
    score = head.operations.score
    last = head.n_clusters - 1

    def other(hidden, selection, *logit_map):
        logits = score(hidden, selection, *logit_map).logits
        differs = (selection.probes == last)[..., None] & (mx.arange(logits.shape[-1]) == 0)
        return Candidates(mx.where(differs, logits * (1 + 2.0**-7), logits))

    monkeypatch.setattr(head.operations, "score", other)
    head._roundings.clear()
    found = head.measure_rounding(mx.bfloat16)[N_STATES]
    assert found.scored >= 2 * head.hidden_size * 2.0**-24
    hidden = mx.random.normal((2, head.hidden_size)).astype(mx.bfloat16)
    assert (found.tolerance(hidden, head.operations).scored > 0).all()


@pytest.mark.parametrize(
    "vocab_size, dtype, n_states",
    [
        (8_000, mx.bfloat16, 125),
        (32_000, mx.float16, 32),
        (262_144, mx.bfloat16, 4),
        (262_144, mx.float16, 4),
        (8_000, mx.float32, 3),
        (300, mx.bfloat16, 128),
    ],
)
def test_as_many_states_are_compared_as_give_a_million_logits(
    monkeypatch, vocab_size, dtype, n_states
):
    monkeypatch.setattr(same_sums, "ENOUGH_LOGITS", 1_000_000)
    assert same_sums.n_compared(vocab_size, dtype) == n_states
    assert same_sums.shows_other_sums(vocab_size, dtype) == (vocab_size > 300)


def test_one_other_logit_of_many_gives_scored_ones_a_tolerance(flash, monkeypatch):
    """Of a small vocabulary three states do not show it."""
    head = flash.head
    monkeypatch.setattr(same_sums, "ENOUGH_LOGITS", 100 * head.vocab_size)
    rare = mx.random.normal((1, head.hidden_size), key=mx.random.key(60)).astype(mx.bfloat16)
    score = head.operations.score

    def other(hidden, selection, *logit_map):
        logits = score(hidden, selection, *logit_map).logits
        is_first = mx.arange(logits.size).reshape(logits.shape) == 0
        differs = is_first & mx.array_equal(hidden, rare)
        return Candidates(mx.where(differs, logits * (1 + 2.0**-7), logits))

    monkeypatch.setattr(head.operations, "score", other)
    assert head.measure_rounding(mx.bfloat16)[N_STATES].scored > 0


def test_scored_logits_of_too_few_have_a_tolerance(flash, monkeypatch):
    monkeypatch.setattr(same_sums, "ENOUGH_LOGITS", 1_000_000)
    assert flash.head.measure_rounding(mx.bfloat16)[N_STATES].scored > 0


def test_a_measured_distance_counts_four_times(flash, monkeypatch):
    """The few states that it was measured on may not show the largest one."""
    head = flash.head
    score = head.operations.score
    # Two roundings do not explain this distance.
    far = 2.0

    def other(hidden, selection, *logit_map):
        return Candidates(score(hidden, selection, *logit_map).logits + far)

    monkeypatch.setattr(head.operations, "score", other)
    head._roundings.clear()
    found = head.measure_rounding(mx.bfloat16)[N_STATES]
    states = mx.random.normal((CLASSES[-1], head.hidden_size), key=mx.random.key(0))
    tolerance = found.tolerance(states[:N_STATES].astype(mx.bfloat16), head.operations)
    assert 3 * far < tolerance.scored.max().item() < 5 * far


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_logits_that_float32_cannot_tell_apart_may_be_neighbours_in_16_bits(dtype):
    flash = make_flash(num_hidden_layers=1, dtype=dtype)
    head = flash.head
    hidden = mx.random.normal((2, head.hidden_size)).astype(dtype)
    found = head.measure_rounding(dtype)[N_STATES].tolerance(hidden, head.operations)
    exact = mx.random.normal((5000,), key=mx.random.key(1)) * 10

    def rounded(logits):
        return logits.astype(dtype).astype(mx.float32)

    lower = rounded(exact * (1 - 8 * FLOAT32))
    higher = rounded(exact * (1 + 8 * FLOAT32))
    distance = mx.abs(lower - higher)
    assert (distance > 0).any() and (distance <= found.relative * mx.abs(lower)).all()


def test_a_kernel_of_another_order_gives_scored_logits_a_tolerance(flash, monkeypatch):
    kernel = DenseKernel("qmv_quad", scored=False)
    monkeypatch.setattr(rounded_product, "_dense_kernel", lambda clustered: kernel)
    assert flash.head.measure_rounding(mx.bfloat16)[N_STATES].scored > 0


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits, added", [(4, 4), (5, 8)])
def test_rounded_sums_of_hidden_values(dtype, bits, added):
    """MLX up to 0.32.3: a row's offset meets sums that are rounded after each addition."""
    rows = make_rows(np.random.default_rng(0), 256, 1024, bits=bits, group_size=64, dtype=dtype)
    hidden = mx.random.normal((3, 1024), key=mx.random.key(0)).astype(dtype)
    values = hidden.reshape(3, -1, 64 // added, added)
    total = values[..., 0]
    for i in range(1, added):
        total = total + values[..., i]
    # There are (3, groups) of them.
    sums = total.astype(mx.float32).sum(axis=-1)
    offsets = rows.biases.astype(mx.float32)
    exact = hidden.astype(mx.float32).reshape(3, -1, 64).sum(axis=-1)
    distance = mx.abs((sums - exact) @ offsets.T).max(axis=-1)
    longest = mx.max(mx.linalg.norm(offsets, axis=-1)).item()
    bound = RoundedSums(dtype, added, 64, longest).tolerance(hidden)
    assert (distance <= bound).all() and (bound < 3 * distance).all()


def test_the_tolerances_have_what_a_state_alone_loses(flash):
    found = flash.head.measure_rounding(mx.bfloat16)[N_STATES]
    more = replace(found, scored=1e-6, sums=RoundedSums(mx.bfloat16, 4, 64, 2.0))
    without = replace(more, sums=None)
    hidden = mx.random.normal((2, flash.head.hidden_size)).astype(mx.bfloat16)
    lost = more.sums.tolerance(hidden)
    pair = [each.tolerance(hidden, flash.head.operations)[:2] for each in (more, without)]
    for one, other in zip(*pair, strict=True):
        assert mx.allclose(one - other, lost, rtol=1e-3) and (lost > 0).all()


def test_all_classes_are_measured_at_once(flash, monkeypatch):
    """And the longest row is computed once for all of them."""
    asked = recorded_calls(monkeypatch, rounded_product, "_longest_rows")
    monkeypatch.setattr(rounded_product, "_classes", lambda: CLASSES)
    head = flash.head
    sizes = (1, 2, 3, 5, 9, 17, 32, 40)
    found = [head.rounding(mx.bfloat16, k) for k in sizes]
    assert asked == [(head.clustered,)]
    known = head.measure_rounding(mx.bfloat16)
    assert list(known) == list(CLASSES)
    classes = [1, 2, 4, 8, 16, 32, 32, 32]
    assert all(one is known[size] for one, size in zip(found, classes, strict=True))


def test_the_longest_row_has_its_bias():
    flash = make_flash(num_hidden_layers=1, arch="phi")
    rows = flash.head.clustered.rows
    lengths = np.linalg.norm(np.array(rows.weight, np.float32), axis=-1)
    lengths += np.abs(np.array(rows.bias))
    longest, offsets = rounded_product._longest_rows(flash.head.clustered)
    assert longest == pytest.approx(lengths.max(), rel=1e-5) and offsets == 0


def test_other_steps_are_measured_anew(flash):
    """Those that take the place of kernels may add in another order; a copy keeps its own."""
    head = flash.head
    copied = deepcopy(head)
    with pytest.MonkeyPatch.context() as patch:
        score = head.operations.score

        def other(hidden, selection, *logit_map):
            return Candidates(score(hidden, selection, *logit_map).logits + 1)

        patch.setattr(head.operations, "score", other)
        assert head.rounding(mx.bfloat16, 1).scored > 0
    shared = deepcopy(head)
    head.fall_back("nothing: it is a test")
    assert head.rounding(mx.bfloat16, 1).scored == 0
    assert shared.rounding(mx.bfloat16, 1).scored > 0
    assert copied.rounding(mx.bfloat16, 1).scored == 0
    assert pickle.loads(pickle.dumps(shared)).rounding(mx.bfloat16, 1).scored == 0
