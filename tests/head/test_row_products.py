"""Products of several states have the bits of single ones, as MLX's own kernels compute these: on
the emulator, as in test_mlx_order.py, or on a GPU."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flash_loops import flash_of
from kernel_cases import changed_kernels, kernels, make_rows, on_gpu
from mlx_flashhead.head import row_products as module
from mlx_flashhead.head.dense_kernels import ANY_ROWS, mlx_version
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.row_products import row_products
from mlx_kernels import mlx_logits
from tiny_models import tiny_model

# This holds also while the emulator is installed.
GPU = on_gpu()
emulator_only = pytest.mark.skipif(GPU, reason="faults and counts of the emulator")

F32 = mx.float32
F16 = mx.float16
BF16 = mx.bfloat16


def make_layer(n_columns, n_rows, form, dtype, biased=False) -> nn.QuantizedLinear:
    rng = np.random.default_rng(0)
    form = dict(zip(("bits", "group_size", "mode"), form, strict=False))
    rows = make_rows(rng, n_rows, n_columns, dtype=dtype, **form)
    layer = nn.QuantizedLinear(n_columns, n_rows, bias=False, **rows.quantization)
    layer.update({name: array for name, array in rows.arrays().items()})
    if biased:
        layer.bias = mx.array(rng.normal(size=n_rows, scale=0.1)).astype(dtype)
    return layer


def matrix_of(layer) -> Matrix:
    arrays = [layer.get(name) for name in ("weight", "scales", "biases", "bias")]
    return Matrix(*arrays, layer.group_size, layer.bits, layer.mode)


def single_products(rows: Matrix, states: mx.array) -> mx.array:
    """What `nn.QuantizedLinear` gives for each state alone on a GPU."""
    if GPU:
        return mx.concatenate([rows.matmul(state[None]) for state in states])
    products = mx.concatenate([mlx_logits(rows, state[None]) for state in states])
    if rows.bias is None:
        return products
    return products + rows.bias


def bits(array: mx.array) -> np.ndarray:
    return np.array(module._bits(array))


def kernel_of(x, rows):
    form = module._form(x, x.size // x.shape[-1], rows)
    return module._Kernel(form, rows)


def states_of(n_states, n_columns, dtype) -> mx.array:
    return mx.random.normal((n_states, n_columns), key=mx.random.key(1)).astype(dtype)


# Blocks of 512 (4 bits), 256 and 1,024 columns are whole or not; rows fill a tile or not
CASES = [
    ((4, 64), (1024, 24), 2, F32, "off", False),
    ((4, 32), (1056, 21), 4, F32, "on", True),
    ((4, 128), (1536, 19), 8, F32, "fast", True),
    ((4, 64), (576, 1), 3, BF16, "on", True),
    ((4, 64), (2048, 9), 5, BF16, "fast", True),
    ((4, 64), (1088, 35), 8, BF16, "on", False),
    ((4, 32), (2048, 17), 7, F16, "fast", True),
    ((5, 64), (1024, 18), 7, F32, "fast", False),
    ((5, 32), (608, 5), 4, F16, "on", True),
    ((6, 64), (768, 17), 8, F32, "off", True),
    ((6, 128), (640, 12), 2, BF16, "fast", False),
    ((8, 64), (512, 15), 6, F32, "on", True),
    ((8, 32), (416, 10), 3, F16, "off", False),
    ((4, 32, "mxfp4"), (1024, 16), 4, F32, "fast", True),
    ((4, 32, "mxfp4"), (96, 3), 8, BF16, "on", False),
    ((8, 32, "mxfp8"), (512, 14), 5, F32, "off", False),
    ((8, 32, "mxfp8"), (288, 7), 2, F16, "fast", True),
    ((4, 16, "nvfp4"), (1024, 11), 8, F32, "on", True),
    ((4, 16, "nvfp4"), (800, 13), 3, BF16, "off", False),
]


@pytest.mark.parametrize("form, sizes, n_states, dtype, contract, biased", CASES, ids=str)
def test_each_state_has_the_bits_of_its_own_product(form, sizes, n_states, dtype, contract, biased):
    rows = matrix_of(make_layer(*sizes, form, dtype, biased))
    states = states_of(n_states, sizes[0], dtype)
    with kernels(check=False, contract=contract):
        expected = single_products(rows, states)
    with kernels(contract=contract, order="shuffle"):
        found = kernel_of(states, rows)(states, rows)
    assert found.dtype == dtype
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    "of_states, of_rows, of_bias", [(F32, BF16, F16), (F16, F32, F32)], ids=str
)
def test_dtypes_that_differ_meet_as_in_mlx(of_states, of_rows, of_bias):
    rows = matrix_of(make_layer(512, 9, (8, 64), of_rows))
    rows = replace(rows, bias=mx.random.normal((9,), key=mx.random.key(2)).astype(of_bias))
    states = states_of(3, 512, of_states)

    def as_float32(array):
        # Packed weights stay as they are.
        if array.dtype == mx.uint32:
            return array
        return array.astype(F32)

    in_float32 = rows.map(as_float32)
    with kernels(check=False):
        expected = single_products(in_float32, states.astype(F32))
        found = kernel_of(states, rows)(states, rows)
    assert found.dtype == F32
    np.testing.assert_array_equal(bits(found), bits(expected))


@emulator_only
@pytest.mark.parametrize(
    "form, numbers", [((4, 64), range(2, 9)), ((8, 32), (3, 8)), ((4, 32, "mxfp4"), (5,))], ids=str
)
def test_the_weights_are_read_once_whatever_the_number_of_states(form, numbers):
    rows = matrix_of(make_layer(512, 24, form, BF16))
    for n_states in numbers:
        states = states_of(n_states, 512, BF16)
        with kernels() as emulator:
            products = kernel_of(states, rows)(states[None], rows)
        assert products.shape == (1, n_states, 24)
        (dispatch,) = emulator.dispatches
        weight, hidden = (dispatch.buffers[name] for name in ("weight", "hidden"))
        assert weight.reads == weight.distinct_bytes_read == rows.weight.nbytes
        assert hidden.distinct_bytes_read == states.nbytes
        assert dispatch.barriers == dispatch.threadgroup_bytes == 0


@emulator_only
@pytest.mark.parametrize(
    "form, times", [((4, 64), 1), ((8, 64), 1), ((4, 32, "mxfp4"), 2)], ids=str
)
def test_a_state_is_read_for_as_many_rows_as_registers_hold(form, times):
    """The values of 4 affine bits wait as half: four rows of them for 8 states too."""
    rows = matrix_of(make_layer(512, 24, form, BF16))
    reads = {}
    for n_states in (4, 8):
        states = states_of(n_states, 512, BF16)
        with kernels() as emulator:
            mx.eval(kernel_of(states, rows)(states, rows))
        (dispatch,) = emulator.dispatches
        reads[n_states] = dispatch.buffers["hidden"].reads / n_states
    assert reads[8] == times * reads[4]


@pytest.fixture
def emulator(monkeypatch):
    """As on a GPU, but for MLX's products; and no way is known yet."""
    if GPU:
        pytest.skip("the emulator's sums are compared")
    monkeypatch.setattr(module, "gpu_is_default", lambda: True)
    monkeypatch.setattr(module, "_ways", {})
    with kernels(check=False) as emulator:
        yield emulator


@pytest.fixture
def as_on_a_gpu(emulator, monkeypatch):
    """Products with one state are those of MLX's kernel."""
    monkeypatch.setattr(Matrix, "matmul", single_products)
    return emulator


@pytest.mark.parametrize("n_columns, n_rows", [(1024, 21), (1056, 5)])
def test_the_kernel_is_tried_once_for_a_form(as_on_a_gpu, caplog, n_columns, n_rows):
    layer = make_layer(n_columns, n_rows, (4, 32), BF16, biased=True)
    for seed in range(2):
        states = mx.random.normal((1, 3, n_columns), BF16, key=mx.random.key(seed))
        found = row_products(states, layer)
        np.testing.assert_array_equal(
            bits(found[0]), bits(single_products(matrix_of(layer), states[0]))
        )
    names = [dispatch.name for dispatch in as_on_a_gpu.dispatches]
    assert names.count("flash_head_row_products") == 1 + 2
    assert len(module._ways) == 1 and not caplog.text


@pytest.fixture
def head():
    """A FlashHead of 4-bit rows."""
    form = {"hidden_size": 512, "bits": 4, "dtype": BF16, "group_size": 64}
    return flash_of(tiny_model(**form)).head


def test_the_dense_rows_of_a_head_are_read_once(head, as_on_a_gpu, monkeypatch):
    """Padded slots among them. Rows that a GPU multiplies in token order are read each time."""
    assert head.clustered.padded
    states = states_of(4, 512, BF16)
    expected = [bits(head.dense_logits(state[None])) for state in states]
    for gathers in (False, True):
        monkeypatch.setattr(head, "gathers_rows", gathers)
        as_on_a_gpu.dispatches.clear()
        found = head.dense_logits_of_each(states[None])
        assert found.shape == (1, 4, head.vocab_size)
        np.testing.assert_array_equal(bits(found[0]), np.concatenate(expected))
        names = [dispatch.name for dispatch in as_on_a_gpu.dispatches]
        # The second one is its trial.
        n_launched = 0 if gathers else 2
        assert names.count("flash_head_row_products") == n_launched


# A place among the products, a row, a state; the order of chunks, of values and of the sums' parts;
# the bias before the rounding.
MUTATIONS = [
    ("n_rows + first + row]", "n_rows + first + (row ^ 1)]"),
    ("(rows, first, last_row, hidden", "(rows, first / 8, last_row, hidden"),
    ("size_t(first_hidden + h) * D", "size_t(first_hidden + (h ^ 1)) * D"),
    (
        "chunk = lane; chunk < uint(Rows::CHUNKS); chunk += LANES",
        "i = 0, chunk = lane * (Rows::CHUNKS / LANES); i < Rows::CHUNKS / LANES; i++, chunk++",
    ),
    (
        "x[i + 2] * float(chunk.q[i + 2]) + x[i + 3] * float(chunk.q[i + 3])",
        "x[i + 3] * float(chunk.q[i + 3]) + x[i + 2] * float(chunk.q[i + 2])",
    ),
    (
        "return total + dot(halves, x, sum)",
        "return total + halves.scale * (dot(halves, x, sum) / halves.scale)",
    ),
    ("T(float(product) + float(bias", "T(totals[h * AT_ONCE + row] + float(bias"),
]


@pytest.mark.parametrize("right, wrong", MUTATIONS)
def test_the_trial_notices_a_kernel_that_is_broken(as_on_a_gpu, caplog, right, wrong):
    """In bfloat16 too, which hides the last bits of most sums."""
    layer = make_layer(1024, 16, (4, 64), BF16, biased=True)
    with changed_kernels(right, wrong):
        assert row_products(states_of(2, 1024, BF16), layer) is None
    assert "FlashHead's kernel adds in another order" in caplog.text


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("form", [(4, 64), (5, 32), (4, 16, "nvfp4")], ids=str)
def test_the_trial_notices_packs_that_are_taken_one_by_one(
    as_on_a_gpu, monkeypatch, caplog, form, dtype
):
    change_template(monkeypatch, WORDS=1)
    assert row_products(states_of(2, 1024, dtype), make_layer(1024, 16, form, dtype)) is None
    assert "FlashHead's kernel adds in another order" in caplog.text


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_the_trial_notices_the_sums_of_another_version(as_on_a_gpu, monkeypatch, caplog, dtype):
    """Four hidden values are added up in float32, or before MLX 0.32.4 in their dtype."""
    of_another_version = dtype if mlx_version() >= ANY_ROWS else F32
    change_template(monkeypatch, SUM=of_another_version)
    assert row_products(states_of(2, 1024, dtype), make_layer(1024, 16, (4, 64), dtype)) is None
    assert "FlashHead's kernel adds in another order" in caplog.text


def change_template(monkeypatch, **arguments) -> None:
    """Other template arguments for the kernel."""
    make = module._Kernel.__init__

    def make_another(kernel, *given):
        make(kernel, *given)
        kernel._template |= arguments

    monkeypatch.setattr(module._Kernel, "__init__", make_another)


def product_of_each(layer, states: mx.array) -> mx.array:
    return mx.concatenate([layer(state[None]) for state in states])


@emulator_only
@pytest.mark.parametrize("form", [(4, 64), (6, 32), (8, 32, "mxfp8"), (4, 16, "nvfp4")], ids=str)
def test_a_cpu_multiplies_state_by_state(form):
    layer = make_layer(320, 30, form, BF16, biased=True)
    states = states_of(12, 320, BF16)
    np.testing.assert_array_equal(
        bits(row_products(states, layer)), bits(product_of_each(layer, states))
    )


def test_one_state_and_too_many(emulator):
    layer = make_layer(320, 30, (4, 64), F32)
    states = states_of(9, 320, F32)
    found = row_products(states[:1], layer)
    np.testing.assert_array_equal(bits(found), bits(layer(states[:1])))
    assert row_products(states, layer) is None and not emulator.dispatches


@pytest.mark.parametrize("form", [(3, 64), (4, 32), (8, 32, "mxfp8")], ids=str)
def test_without_the_kernel_each_state_is_gathered(emulator, caplog, form):
    """3 bits it does not read, and the others differ here: a CPU adds in another order."""
    layer = make_layer(1024, 30, form, F32, biased=True)
    for shape in ((5, 1024), (1, 5, 1024)):
        states = states_of(5, 1024, F32).reshape(shape)
        found = row_products(states, layer)
        assert found.shape == (*shape[:-1], 30)
        expected = product_of_each(layer, states.reshape(5, 1024))
        np.testing.assert_array_equal(bits(found).reshape(5, 30), bits(expected))
    assert list(module._ways.values()) == [module._gathered]
    said = "FlashHead's kernel adds in another order than MLX's own for one state: it is not used."
    assert caplog.text.count(said) == (form[0] != 3)


def test_narrow_rows_are_multiplied_at_once(emulator, monkeypatch, caplog):
    """By no more than 5 states, which have MLX's kernel for one on every GPU."""
    layer = make_layer(128, 30, (4, 32), F16)
    states = states_of(7, 128, F16)
    taken = []

    def matmul(rows, x, product=Matrix.matmul):
        taken.append(len(x))
        return product(rows, x)

    monkeypatch.setattr(Matrix, "matmul", matmul)
    found = row_products(states, layer)
    np.testing.assert_array_equal(bits(found), bits(product_of_each(layer, states)))
    assert taken == [1] * 7 + [5, 2, 5, 2] and not emulator.dispatches and not caplog.text


def test_a_kernel_that_does_not_run_is_not_used(emulator, monkeypatch, caplog):
    def refuse(**_):
        raise RuntimeError("Unable to build metal library from source.")

    layer = make_layer(1024, 30, (4, 64), BF16)
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", lambda **_: refuse)
        assert row_products(states_of(2, 1024, BF16), layer) is not None
    said = "For 2 states of 1024 bfloat16 and 4-bit affine rows FlashHead's kernel does not run on "
    assert said + "this device (Unable to build metal library from source)" in caplog.text


def test_no_way_is_none(emulator, monkeypatch, caplog):
    """And asks no second time."""
    monkeypatch.setattr(mx, "gather_qmm", lambda *given, **_: mx.zeros((3, 1, 30)))
    layer = make_layer(1024, 30, (4, 64), F32)
    for _ in range(2):
        assert row_products(states_of(3, 1024, F32), layer) is None
    assert caplog.text.count("it is not used.") == 2 and module._ways.popitem()[1] is None


def test_a_product_is_one_dispatch():
    """In MLX's own graph, which records the kernel on a machine without Metal too."""
    rows = matrix_of(make_layer(1024, 30, (4, 64), BF16, biased=True))
    mx.eval(rows.arrays())
    views = {"Reshape", "ExpandDims", "Squeeze", "Broadcast"}
    ways = (
        (kernel_of(states_of(4, 1024, BF16), rows), {"CustomKernel"}),
        # The bias is added after the product.
        (module._gathered, {"GatherQMM", "Add"}),
    )
    for way, expected in ways:
        events = []
        states = mx.zeros((1, 4, 1024), BF16)
        mx.export_function(events.append, partial(way, rows=rows), states)
        names = {event["name"] for event in events if event["type"] == "primitive"} - views
        assert names == expected


def test_long_layers_are_tried_by_a_part_of_their_rows():
    rows = matrix_of(make_layer(64, 5003, (4, 64), F32))
    form = module._form(states_of(2, 64, F32), 2, rows)
    assert form.n_rows == 4096 + 3
    # One group has no partner.
    assert mx.array_equal(module._tried_states(form)[0], mx.zeros(64))
    tried = module._tried_rows(form)
    assert (tried.n_rows, tried.hidden_size, tried.scales.dtype) == (4099, 64, F32)
