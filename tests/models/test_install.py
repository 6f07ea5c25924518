"""FlashHead on a whole model: the same logits and parameters, what it rejects, detaching."""

import copy
import gc
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from architecture_configs import VOCAB_SIZE
from architecture_models import tiny_architecture
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
SOME = ("tied-float32", "untied-float32", "bias-float32", "tied-4-bit", "untied-4-bit")
some_models = pytest.mark.parametrize("how", [MODELS[kind] for kind in SOME], ids=SOME)


def installed(model, **options):
    return install_index(model, tiny_index(model, **options), backend="mlx")


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
    with head.settings():
        sparse = model(TOKENS)
    assert sparse.dtype == dense.dtype and not close(sparse, dense) and close(model(TOKENS), dense)
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
    assert mx.array_equal(model(TOKENS), dense) and get_flash_head(model) is None


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


@some_models
def test_copies_and_a_dense_copy_are_independent(how):
    """Pickled, copied and dense, which shares all but the rows."""
    model = tiny_model(**how)
    before, logits = parameters(model), model(TOKENS)
    body = tree_flatten(model.model.layers[0].parameters(), destination={})
    head = installed(model)
    sparse = model(TOKENS)
    dense, copied = dense_copy(model), copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    assert get_flash_head(dense) is None and get_flash_head(model) is head
    assert mx.array_equal(dense(TOKENS), logits)
    shared = tree_flatten(dense.model.layers[0].parameters(), destination={})
    for name, array in body.items():
        here, there = (np.array(a, copy=False).ctypes.data for a in (array, shared[name]))
        assert here == there, name
    for other in (dense, copied, pickled):
        assert parameters(other) == before
    for other in (copied, pickled):
        assert mx.array_equal(other(TOKENS), sparse)
        assert get_flash_head(other) not in (None, head)
    get_flash_head(copied).n_probes = get_flash_head(copied).n_clusters
    assert head.n_probes == 4
    with pytest.raises(ValueError, match="cannot be changed"):
        copied.set_dtype(mx.float16)
    copied.load_weights([(n, a) for n, a in doubled(copied) if "norm" in n], strict=False)
    copied.freeze()
    assert mx.array_equal(model(TOKENS), sparse) and tree_flatten(model.trainable_parameters())
    detach(model)
    assert get_flash_head(copied) is not None and parameters(model) == before
    assert not mx.allclose(copied(TOKENS), logits)  # its norms have other weights
    for other in (copied, pickled):
        detach(other)
        assert type(other) is type(model)
    module = find_head(copied).module
    module.weight = module.weight * 0
    assert parameters(model) == parameters(pickled) == before


def doubled(model) -> list:
    return [(name, array * 2) for name, array in tree_flatten(model.parameters())]


# of a model, the module that holds its head (itself, or its body where they are tied), and the head
CHANGES = {
    "set_dtype": lambda model, *_: model.set_dtype(mx.float16),
    "apply": lambda model, *_: model.apply(lambda array: array * 2),
    "update": lambda model, *_: model.update(model.parameters()),
    "update, not strict": lambda model, *_: model.update(
        {"layers": [], **model.parameters()}, strict=False
    ),
    "load_weights": lambda model, *_: model.load_weights(doubled(model)),
    "load_weights, not strict": lambda model, *_: model.load_weights(doubled(model), strict=False),
    "quantize": lambda model, *_: nn.quantize(model, group_size=32, bits=8),
    "the body's set_dtype": lambda model, parent, head: parent.set_dtype(mx.float16),
    "the layer's set_dtype": lambda model, parent, head: head.set_dtype(mx.float16),
    "the layer's update": lambda model, parent, head: head.update({"weight": mx.zeros(1)}),
    "assignment": lambda model, parent, head: setattr(head, "weight", mx.zeros(1)),
    "item": lambda model, parent, head: head.__setitem__("weight", mx.zeros(1)),
}


@some_models
def test_changes_are_refused_but_of_the_rest(how):
    model = tiny_model(**how)
    installed(model)
    location, before, logits = find_head(model), parameters(model), model(TOKENS)
    parent = dict(model.named_modules())[location.path.rpartition(".")[0]]
    modules = [id(module) for module in model.modules()]
    for name, change in CHANGES.items():
        said = "output projection under FlashHead cannot be changed: call mlx_flashhead.detach"
        with pytest.raises(ValueError, match=said):
            change(model, parent, location.module)
        assert parameters(model) == before, name
        assert [id(module) for module in model.modules()] == modules, name
        assert mx.array_equal(model(TOKENS), logits), name
    of_body = dict(doubled(model))
    of_body = {name: array for name, array in of_body.items()
               if not name.startswith(location.path) and array.dtype != mx.uint32}  # fmt: skip
    model.load_weights([*of_body.items()], strict=False)
    for was, now in zip(before, parameters(model), strict=True):
        assert (was == now) == (was[0] not in of_body), was[0]
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())
    quantized = nn.Linear if how.get("bits") is None else ()
    nn.quantize(model, group_size=32, class_predicate=lambda p, m: type(m) is quantized)
    assert get_flash_head(model) is not None and model(TOKENS).shape == (2, 4, 203)


def test_installing_twice_and_uninstalling_nothing():
    model = tiny_model()
    before, index = parameters(model), tiny_index(model)
    head = install_index(model, index)
    with pytest.raises(ValueError, match=r"already installed.*: detach it first\.$"):
        install_index(model, index)
    assert get_flash_head(model) is head
    detach(model)
    with pytest.raises(ValueError, match="no FlashHead on this model"):
        detach(model)
    assert parameters(model) == before
    assert install_index(model, index) is get_flash_head(model)


@some_models
def test_failed_installation_leaves_the_model(how):
    model = tiny_model(**how)
    before, dense = parameters(model), model(TOKENS)
    classes = [type(module) for module in model.modules()]
    index, other = tiny_index(model), tiny_index(tiny_model(vocab_size=99))
    arguments = {"token_ids": index.token_ids, "centroids": index.centroids, "n_probes": 4}
    unfit = {"n_probes": 1000, "backend": "cuda", "centroids": other.centroids}
    unfit["token_ids"] = index.token_ids * 0
    for name, value in unfit.items():
        with pytest.raises(ValueError):
            install(model, **arguments | {name: value})
        assert [type(module) for module in model.modules()] == classes, name
        assert parameters(model) == before and mx.array_equal(model(TOKENS), dense), name
        assert get_flash_head(model) is None


# The layer, used for something else than logits, answers as the dense one does.


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4"])
def test_tokens_are_found_by_their_embeddings(name):
    """As gemma4 finds the inputs of its layers from embeddings alone."""
    dense, flash = (tiny_architecture(name, tied=True) for _ in range(2))
    installed(flash, n_probes=2)
    for model in (dense, flash):
        model.text = getattr(model, "language_model", model).model
    tokens = mx.array([[5, VOCAB_SIZE - 1, 77, 0, 230]])
    by_ids = dense.text._get_per_layer_inputs(tokens)
    for model in (dense, flash):
        found = model.text._get_per_layer_inputs(None, model.text.embed_tokens(tokens))
        assert mx.allclose(found, by_ids, atol=1e-5)
    assert mx.allclose(flash(tokens), dense(tokens), atol=1e-4)
    with get_flash_head(flash).settings():
        assert not mx.allclose(flash(tokens), dense(tokens), atol=1e-3)  # logits have estimates


def loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens), tokens).mean()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", [{}, {"bits": 4}])
def test_gradients_of_a_model_in_training(tied, form):
    dense, flash = (tiny_model(tied=tied, **form) for _ in range(2))
    installed(flash)
    tokens = mx.array([[3, 50, 7]])
    gradients = []
    for model in (dense, flash):
        model.train()
        model.freeze()
        model.layers[0].self_attn.unfreeze(keys=["bias", "weight"] if not form else ["scales"])
        value, found = nn.value_and_grad(model, loss)(model, tokens)
        gradients.append((value, found["model"]["layers"][0]["self_attn"]["q_proj"]))
    (value, expected), (same, found) = gradients
    assert mx.allclose(value, same, atol=1e-5)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        assert mx.abs(gradient).max() > 0
        assert mx.allclose(gradient, found[key], rtol=1e-3, atol=1e-5)
