"""FlashHead on a whole model: the same logits, the same parameters, and the way back."""

import gc
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_flashhead.models.install import dense_copy, detach, get_flash_head
from mlx_flashhead.models.locate import find_head
from tiny_models import install_index, parameters, tiny_index, tiny_model

TOKENS = mx.array([[3, 1, 200, 7], [9, 9, 0, 202]])
TIED, UNTIED, BIAS = {"tied": True}, {"tied": False}, {"arch": "phi"}
MODELS = {
    f"{kind}-{form}": head | how
    for kind, head in {"tied": TIED, "untied": UNTIED, "bias": BIAS}.items()
    for form, how in {
        "float32": {},
        "float16": {"dtype": mx.float16},
        "bfloat16": {"dtype": mx.bfloat16},
        "4-bit": {"bits": 4},
        "4-bit-bfloat16": {"bits": 4, "dtype": mx.bfloat16},
        "8-bit": {"bits": 8, "group_size": 64},
        "mxfp4": {"bits": 4, "mode": "mxfp4"},
    }.items()
}
models = pytest.mark.parametrize("how", MODELS.values(), ids=MODELS)
tied_or_not = pytest.mark.parametrize("how", [TIED, UNTIED, BIAS], ids=["tied", "untied", "bias"])


def installed(model, **kwargs):
    return install_index(model, tiny_index(model, **kwargs), backend="mlx")


def close(actual: mx.array, expected: mx.array) -> bool:
    rounding = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 1e-1}[expected.dtype]
    difference = mx.abs(actual.astype(mx.float32) - expected.astype(mx.float32))
    return actual.dtype == expected.dtype and difference.max().item() <= rounding


@models
def test_all_probes_give_the_models_logits(how):
    model = tiny_model(**how)
    dense = model(TOKENS)
    head = installed(model)
    assert get_flash_head(model) is head
    sparse = model(TOKENS)
    assert sparse.dtype == dense.dtype
    assert not close(sparse, dense)
    head.n_probes = head.n_clusters
    assert close(model(TOKENS), dense)
    head.n_probes = 4
    with head.dense():
        assert close(model(TOKENS), dense)


@models
def test_the_model_looks_dense_and_is_so_again_afterwards(how, tmp_path):
    model = tiny_model(**how)
    before, dense, text = parameters(model), model(TOKENS), repr(model)
    module = find_head(model).module
    weight = mx.array(module.weight)
    classes = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    installed(model)
    assert parameters(model) == before and repr(model) == text
    assert mx.array_equal(module.weight, weight) and mx.array_equal(module["weight"], weight)
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    file = str(tmp_path / "model.safetensors")
    model.save_weights(file)
    fresh = tiny_model(**how, seed=1)
    fresh.load_weights(file)
    assert parameters(fresh) == before
    detach(model)
    assert parameters(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert mx.array_equal(model(TOKENS), dense)
    assert get_flash_head(model) is None


@tied_or_not
def test_dense_copy_shares_all_but_the_rows(how):
    model = tiny_model(**how)
    before, logits = parameters(model), model(TOKENS)
    body = tree_flatten(model.model.layers[0].parameters(), destination={})
    head = installed(model)
    sparse = model(TOKENS)
    dense = dense_copy(model)
    assert get_flash_head(dense) is None and get_flash_head(model) is head
    assert parameters(dense) == before
    assert mx.array_equal(dense(TOKENS), logits) and mx.array_equal(model(TOKENS), sparse)
    copied = tree_flatten(dense.model.layers[0].parameters(), destination={})
    for name, array in body.items():
        here, there = (np.array(a, copy=False).ctypes.data for a in (array, copied[name]))
        assert here == there, name
    with pytest.raises(ValueError, match="no FlashHead"):
        dense_copy(dense)


def test_memory_added_is_the_index():
    """No second copy of the rows: only centroids and ids are added."""
    vocab_size, n_clusters = 20_000, 1250
    model = tiny_model(vocab_size=vocab_size)
    index = tiny_index(model, cluster_size=16)
    centroids = index.centroids
    stage_1 = [*centroids.matrix.arrays().values(), centroids.bias, centroids.tail_offset]
    gc.collect()
    before = mx.get_active_memory() - sum(array.nbytes for array in stage_1)
    head = install_index(model, index, backend="mlx")
    gc.collect()
    added = mx.get_active_memory() - before
    rows = sum(array.nbytes for array in head.clustered.rows.arrays().values())
    counted = sum(array.nbytes for array in head.arrays()) - rows
    assert counted == pytest.approx(added, abs=50_000)  # others' arrays may come or go meanwhile
    stored = n_clusters * 64 * (0.5 + 4 / 32)  # 4 bits, and two float16 for 32 of them
    dequantised = n_clusters * 64 * 4
    ids = 2 * 4 * vocab_size
    assert added <= stored + dequantised + 3 * 4 * n_clusters + ids + 50_000
    assert added < rows / 5
    detach(model)
    del head, index, centroids, stage_1
    gc.collect()
    assert mx.get_active_memory() <= before + 50_000


@tied_or_not
def test_the_prompts_logits_are_never_made(how, monkeypatch):
    vocab_size, length = 20_000, 1000
    model = tiny_model(vocab_size=vocab_size, **how)
    head = installed(model, cluster_size=100)
    prompt = mx.arange(length) * 7 % vocab_size
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tokens = [token for token, _ in generate_step(prompt, model, max_tokens=3)]
    grown = mx.get_peak_memory() - before
    assert len(tokens) == 3
    assert grown < length * vocab_size * 4 / 3
    with head.dense():  # what it looks like when they are made
        mx.eval(model(prompt[None]))
    assert mx.get_peak_memory() - before > length * vocab_size * 4


@pytest.mark.parametrize("form", [{}, {"tied": False, "bits": 4}, {"dtype": mx.bfloat16}], ids=str)
def test_a_model_with_a_flash_head_pickles(form):
    model = tiny_model(**form)
    tokens = mx.array([[3, 1, 7]])
    dense = model(tokens)
    installed(model)
    copied = pickle.loads(pickle.dumps(model))
    assert mx.array_equal(copied(tokens), model(tokens))
    assert get_flash_head(copied) is not get_flash_head(model)
    detach(copied)
    assert type(copied) is type(tiny_model())
    assert mx.array_equal(copied(tokens), dense)


def test_a_model_that_was_quantized_in_memory_uses_its_flash_head():
    """MLX's new layers are in training mode, in which a FlashHead scores every token."""
    model = tiny_model(tied=False)
    nn.quantize(model, group_size=32, bits=4)
    tokens = mx.array([[3, 1, 7]])
    dense = model(tokens)
    installed(model)
    assert not mx.allclose(model(tokens), dense, atol=1e-2)
    model.train()
    assert mx.allclose(model(tokens), dense, atol=1e-4)
