"""FlashHead on a whole model: the same logits and parameters, what it refuses, the way back."""

import copy
import gc
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_flashhead.models.install import dense_copy, detach, get_flash_head, install
from mlx_flashhead.models.locate import find_head
from tiny_models import install_index, parameters, tiny_index, tiny_model

TOKENS = mx.array([[3, 1, 200, 7], [9, 9, 0, 202]])
MODELS = {
    f"{kind}-{form}": head | how
    for kind, head in {"tied": {}, "untied": {"tied": False}, "bias": {"arch": "phi"}}.items()
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
KINDS = ("tied-float32", "untied-float32", "bias-float32")
kinds = pytest.mark.parametrize("how", [MODELS[kind] for kind in KINDS], ids=KINDS)
SOME = (*KINDS, "tied-4-bit", "untied-4-bit")
some_models = pytest.mark.parametrize("how", [MODELS[kind] for kind in SOME], ids=SOME)


def installed(model, **kwargs):
    return install_index(model, tiny_index(model, **kwargs), backend="mlx")


def close(actual: mx.array, expected: mx.array) -> bool:
    rounding = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 1e-1}[expected.dtype]
    difference = mx.abs(actual.astype(mx.float32) - expected.astype(mx.float32))
    return actual.dtype == expected.dtype and difference.max().item() <= rounding


@models
def test_all_probes_give_the_models_logits_and_it_looks_dense_and_is_so_again(how, tmp_path):
    model = tiny_model(**how)
    before, dense, text = parameters(model), model(TOKENS), repr(model)
    module = find_head(model).module
    weight = mx.array(module.weight)
    classes = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    head = installed(model)
    assert get_flash_head(model) is head
    sparse = model(TOKENS)
    assert sparse.dtype == dense.dtype and not close(sparse, dense)
    for settings in ({"n_probes": head.n_clusters}, {"dense": True}):
        with head.settings(**settings):
            assert close(model(TOKENS), dense)
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


@kinds
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


@kinds
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


def doubled(model) -> list:
    return [(name, array * 2) for name, array in tree_flatten(model.parameters())]


def head_module(model) -> nn.Module:
    return find_head(model).module


def find_parent(model) -> nn.Module:
    """The module that holds the head: the model itself, or its body where they are tied."""
    path = find_head(model).path.rpartition(".")[0]
    return dict(model.named_modules())[path]


CHANGES = {
    "set_dtype": lambda model: model.set_dtype(mx.float16),
    "apply": lambda model: model.apply(lambda array: array * 2),
    "update": lambda model: model.update(model.parameters()),
    "update, not strict": lambda model: model.update(
        {"layers": [], **model.parameters()}, strict=False
    ),
    "load_weights": lambda model: model.load_weights(doubled(model)),
    "load_weights, not strict": lambda model: model.load_weights(doubled(model), strict=False),
    "quantize": lambda model: nn.quantize(model, group_size=32, bits=8),
    "the body's set_dtype": lambda model: find_parent(model).set_dtype(mx.float16),
    "the layer's set_dtype": lambda model: head_module(model).set_dtype(mx.float16),
    "the layer's update": lambda model: head_module(model).update({"weight": mx.zeros(1)}),
    "assignment": lambda model: setattr(head_module(model), "weight", mx.zeros(1)),
    "no weight": lambda model: setattr(head_module(model), "weight", None),
    "item": lambda model: head_module(model).__setitem__("weight", mx.zeros(1)),
    "deletion": lambda model: delattr(head_module(model), "weight"),
    "deleted item": lambda model: head_module(model).__delitem__("weight"),
    "pop": lambda model: head_module(model).pop("weight"),
}


@some_models
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_refused(how, change):
    model = tiny_model(**how)
    installed(model)
    before, logits = parameters(model), model(TOKENS)
    modules = [id(module) for module in model.modules()]
    with pytest.raises(ValueError) as error:
        change(model)
    message = str(error.value)
    assert "output projection under FlashHead cannot be changed: call mlx_flashhead.det" in message
    assert "\n" not in message
    assert parameters(model) == before
    assert [id(module) for module in model.modules()] == modules
    assert mx.array_equal(model(TOKENS), logits)
    detach(model)
    assert parameters(model) == before


@some_models
def test_the_rest_can_be_changed(how):
    model = tiny_model(**how)
    installed(model)
    before, path = dict((name, rest) for name, *rest in parameters(model)), find_head(model).path
    of_body = [(n, a) for n, a in doubled(model) if not n.startswith(path) and a.dtype != mx.uint32]
    model.load_weights(of_body, strict=False)
    for name, *rest in parameters(model):
        assert (rest == before[name]) == (name not in dict(of_body)), name
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())
    quantized = nn.Linear if how.get("bits") is None else ()
    nn.quantize(model, group_size=32, class_predicate=lambda p, m: type(m) is quantized)
    assert get_flash_head(model) is not None
    assert model(TOKENS).shape == (2, 4, 203)


@some_models
def test_deepcopy_is_independent(how):
    model = tiny_model(**how)
    head = installed(model)
    before, sparse = parameters(model), model(TOKENS)
    copied = copy.deepcopy(model)
    assert parameters(copied) == before
    assert mx.array_equal(copied(TOKENS), sparse)
    other = get_flash_head(copied)
    other.n_probes = other.n_clusters
    assert head.n_probes == 4
    dense = copied(TOKENS)
    with pytest.raises(ValueError, match="cannot be changed"):
        copied.set_dtype(mx.float16)
    copied.load_weights([(n, a) for n, a in doubled(copied) if "norm" in n], strict=False)
    copied.freeze()
    assert mx.array_equal(model(TOKENS), sparse)
    assert tree_flatten(model.trainable_parameters())

    detach(model)
    assert get_flash_head(copied) is other
    assert parameters(model) == before
    assert mx.allclose(model(TOKENS), tiny_model(**how)(TOKENS))
    assert not mx.allclose(copied(TOKENS), dense)  # its norms have other weights
    detach(copied)
    head_module(copied).weight = head_module(copied).weight * 0
    assert parameters(model) == before


def test_installing_twice_and_uninstalling_nothing():
    model = tiny_model()
    head = installed(model)
    before = parameters(model)
    index = tiny_index(tiny_model())
    with pytest.raises(ValueError, match=r"already installed.*: detach it first\.$"):
        install_index(model, index)
    assert get_flash_head(model) is head
    detach(model)
    with pytest.raises(ValueError, match="no FlashHead on this model"):
        detach(model)
    assert parameters(model) == before
    installed_again = install_index(model, index)
    assert get_flash_head(model) is installed_again


@some_models
@pytest.mark.parametrize("wrong", ["n_probes", "backend", "token_ids", "centroids"])
def test_failed_installation_leaves_the_model(how, wrong):
    model = tiny_model(**how)
    before, dense = parameters(model), model(TOKENS)
    classes = [type(module) for module in model.modules()]
    index, other = tiny_index(model), tiny_index(tiny_model(vocab_size=99))
    arguments = {"token_ids": index.token_ids, "centroids": index.centroids, "n_probes": 4}
    unfit = {"n_probes": 1000, "backend": "cuda", "centroids": other.centroids}
    unfit["token_ids"] = index.token_ids * 0
    with pytest.raises(ValueError):
        install(model, **arguments | {wrong: unfit[wrong]})
    assert [type(module) for module in model.modules()] == classes
    assert parameters(model) == before
    assert mx.array_equal(model(TOKENS), dense)
    assert get_flash_head(model) is None
