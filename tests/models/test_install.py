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
from flash_loops import flash_of
from mlx_flashhead.models.install import dense_copy, detach, get_flash_head, install
from mlx_flashhead.models.locate import find_head
from tiny_models import FORMS, install_index, parameters, tiny_index, tiny_model

TOKENS = mx.array([[3, 1, 200, 7], [9, 9, 0, 202]])
MODELS = {
    f"{kind}-{form}": head | how
    for kind, head in {"tied": {}, "untied": {"tied": False}, "bias": {"arch": "phi"}}.items()
    for form, how in FORMS.items()
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


def forms(model) -> list:
    """The classes and attributes of all modules."""
    return [(type(module), sorted(vars(module))) for module in model.modules()]


@models
def test_all_probes_give_the_models_logits_and_it_looks_dense_and_is_so_again(how, tmp_path):
    model = tiny_model(**how)
    before = parameters(model)
    dense = model(TOKENS)
    text = repr(model)
    was = forms(model)
    module = find_head(model).module
    weight = mx.array(module.weight)
    head = installed(model)
    assert get_flash_head(model) is head
    with head.settings():
        sparse = model(TOKENS)
    assert sparse.dtype == dense.dtype
    assert not close(sparse, dense)
    assert close(model(TOKENS), dense)
    for settings in ({"n_probes": head.n_clusters}, {"dense": True}):
        with head.settings(**settings):
            assert close(model(TOKENS), dense)
    assert parameters(model) == before
    assert repr(model) == text
    assert mx.array_equal(module.weight, weight)
    assert mx.array_equal(module["weight"], weight)
    assert all(isinstance(m, cls) for m, (cls, _) in zip(model.modules(), was, strict=True))
    file = str(tmp_path / "model.safetensors")
    model.save_weights(file)
    fresh = tiny_model(**how, seed=1)
    fresh.load_weights(file)
    assert parameters(fresh) == before
    detach(model)
    assert parameters(model) == before
    assert forms(model) == was
    assert mx.array_equal(model(TOKENS), dense)
    assert get_flash_head(model) is None


def test_memory_added_is_the_index():
    model = tiny_model(vocab_size=20_000)
    index = tiny_index(model, cluster_size=16)
    gc.collect()
    before = mx.get_active_memory()
    head = install_index(model, index, backend="mlx")
    gc.collect()
    rows = head.clustered.rows.nbytes
    assert mx.get_active_memory() - before < rows / 5
    detach(model)
    del head, index
    gc.collect()
    # Others' arrays may come or go meanwhile.
    assert mx.get_active_memory() <= before + 50_000


def address_of_weights(model) -> int:
    return np.array(model.model.layers[0].input_layernorm.weight, copy=False).ctypes.data


@some_models
def test_copies_and_a_dense_copy_are_independent(how):
    model = tiny_model(**how)
    before = parameters(model)
    logits = model(TOKENS)
    head = installed(model)
    sparse = model(TOKENS)
    dense = dense_copy(model)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    assert get_flash_head(dense) is None
    assert get_flash_head(model) is head
    assert mx.array_equal(dense(TOKENS), logits)
    assert address_of_weights(model) == address_of_weights(dense)
    for other in (dense, copied, pickled):
        assert parameters(other) == before
    for other in (copied, pickled):
        assert mx.array_equal(other(TOKENS), sparse)
        assert get_flash_head(other) not in (None, head)
    get_flash_head(copied).n_probes = np.int64(get_flash_head(copied).n_clusters)
    assert head.n_probes == 4
    assert type(get_flash_head(copied).n_probes) is int
    shared = zip(get_flash_head(copied).arrays(), head.arrays(), strict=True)
    assert all(one is other for one, other in shared)
    with pytest.raises(ValueError, match="cannot be changed"):
        copied.set_dtype(mx.float16)
    copied.load_weights([(n, a) for n, a in doubled(copied) if "norm" in n], strict=False)
    copied.freeze()
    assert mx.array_equal(model(TOKENS), sparse)
    assert tree_flatten(model.trainable_parameters())
    detach(model)
    assert get_flash_head(copied) is not None
    assert parameters(model) == before
    # Its norms have other weights.
    assert not mx.allclose(copied(TOKENS), logits)
    detach(copied)
    module = find_head(copied).module
    module.weight = module.weight * 0
    assert parameters(model) == parameters(pickled) == before


def doubled(model) -> list:
    return [(name, array * 2) for name, array in tree_flatten(model.parameters())]


# Each takes a model, the module that holds its head (itself, or its body where they are tied), and
# the head. The first three change the head alone.
CHANGES = [
    lambda model, parent, head: head.update({"weight": mx.zeros(1)}),
    lambda model, parent, head: setattr(head, "weight", mx.zeros(1)),
    lambda model, parent, head: head.__setitem__("weight", mx.zeros(1)),
    lambda model, *_: model.set_dtype(mx.float16),
    lambda model, *_: model.apply(lambda array: array * 2),
    lambda model, *_: model.update({"layers": [], **model.parameters()}, strict=False),
    lambda model, *_: model.load_weights(doubled(model)),
    lambda model, *_: model.load_weights(doubled(model), strict=False),
    lambda model, parent, head: parent.set_dtype(mx.float16),
]


@some_models
def test_changes_are_refused_but_of_the_rest(how):
    model = tiny_model(**how)
    head = installed(model)
    location = find_head(model)
    before = parameters(model)
    logits = model(TOKENS)
    parent = dict(model.named_modules())[location.path.rpartition(".")[0]]
    for i, change in enumerate(CHANGES):
        said = "output projection under FlashHead cannot be changed: call mlx_flashhead.detach"
        with pytest.raises(ValueError, match=said):
            change(model, parent, location.module)
        assert get_flash_head(model) is head, i
        if i < 3:
            assert parameters(model) == before, i
            assert mx.array_equal(model(TOKENS), logits), i
    before = parameters(model)
    of_body = {}
    for name, array in doubled(model):
        if not name.startswith(location.path) and array.dtype != mx.uint32:
            of_body[name] = array
    model.load_weights([*of_body.items()], strict=False)
    for was, now in zip(before, parameters(model), strict=True):
        assert (was == now) == (was[0] not in of_body), was[0]
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())
    if how.get("bits") is None:
        nn.quantize(model, group_size=32, class_predicate=lambda path, m: type(m) is nn.Linear)
    assert get_flash_head(model) is not None
    assert model(TOKENS).shape == (2, 4, 203)


@some_models
def test_failed_installation_leaves_the_model(how):
    """Of what does not fit, or a second time; and so does a failed removal."""
    model = tiny_model(**how)
    before = parameters(model)
    dense = model(TOKENS)
    was = forms(model)
    index = tiny_index(model)
    other = tiny_index(tiny_model(vocab_size=99))
    arguments = {"token_ids": index.token_ids, "centroids": index.centroids, "n_probes": 4}
    unfit = {"n_probes": 1000, "backend": "cuda", "centroids": other.centroids}
    unfit["token_ids"] = index.token_ids * 0
    for name, value in unfit.items():
        with pytest.raises(ValueError):
            install(model, **arguments | {name: value})
        assert forms(model) == was, name
        assert get_flash_head(model) is None, name
        assert parameters(model) == before, name
        assert mx.array_equal(model(TOKENS), dense), name
    head = install_index(model, index)
    with pytest.raises(ValueError, match=r"already installed.*: detach it first\.$"):
        install_index(model, index)
    assert get_flash_head(model) is head
    detach(model)
    with pytest.raises(ValueError, match="no FlashHead on this model"):
        detach(model)
    assert parameters(model) == before
    assert forms(model) == was


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
        # Some of its logits are estimates.
        assert not mx.allclose(flash(tokens), dense(tokens), atol=1e-3)


def loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens), tokens).mean()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form, key", [({}, "weight"), ({"bits": 4}, "scales")])
def test_gradients_of_a_model_in_training(tied, form, key):
    gradients = []
    for flash in (False, True):
        model = tiny_model(tied=tied, **form)
        if flash:
            installed(model)
        model.train()
        model.freeze()
        model.layers[0].self_attn.unfreeze(keys=[key])
        value, found = nn.value_and_grad(model, loss)(model, TOKENS)
        gradients += [value, found["model"]["layers"][0]["self_attn"]["q_proj"][key]]
    assert mx.allclose(gradients[0], gradients[2], atol=1e-5)
    assert mx.allclose(gradients[1], gradients[3], rtol=1e-3, atol=1e-5)
    assert mx.abs(gradients[1]).max() > 0


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_head_with_a_bias_has_the_logits_of_the_models_own(dtype):
    """To the last bit: a CPU rounds a product and its bias once."""
    dense = tiny_model("phi", dtype=dtype)
    projection = dense.lm_head
    projection.bias = mx.random.normal(projection.bias.shape, key=mx.random.key(1)).astype(dtype)
    head = flash_of(copy.deepcopy(dense)).head
    width = projection.weight.shape[1]
    states = mx.random.normal((8, width), key=mx.random.key(2)).astype(dtype)
    for state in mx.split(states, 8):
        assert mx.array_equal(head.dense_logits(state), projection(state))
