"""What an installed model refuses, and that a refusal or a failure leaves it as it was."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_flashhead.models.install import detach, get_flash_head, install
from mlx_flashhead.models.locate import find_head
from tiny_models import install_index, parameters, tiny_index, tiny_model

TOKENS = mx.array([[3, 1, 200, 7]])
MODELS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "bias": {"arch": "phi"},
    "tied-4-bit": {"tied": True, "bits": 4},
    "untied-4-bit": {"tied": False, "bits": 4},
}
models = pytest.mark.parametrize("how", MODELS.values(), ids=MODELS)


def installed(how):
    model = tiny_model(**how)
    return model, install_index(model, tiny_index(model), backend="mlx")


def doubled(model) -> list:
    return [(name, array * 2) for name, array in tree_flatten(model.parameters())]


def head_module(model) -> nn.Module:
    return find_head(model).module


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


def find_parent(model) -> nn.Module:
    """The module that holds the head: the model itself, or its body where they are tied."""
    path = find_head(model).path.rpartition(".")[0]
    return dict(model.named_modules())[path]


@models
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_refused(how, change):
    model, _ = installed(how)
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


@models
def test_the_rest_can_be_changed(how):
    model, _ = installed(how)
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
    assert model(TOKENS).shape == (1, 4, 203)


@models
def test_deepcopy_is_independent(how):
    model, head = installed(how)
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
    model, head = installed({})
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


@models
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
