"""The head is found, and one that cannot be served is an error; `test_architectures.py` has all."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashhead.models import locate
from mlx_flashhead.models.locate import HeadLocation, find_head, recorded_hidden
from tiny_models import tiny_model

TOKENS = mx.array([[3, 1, 200, 7, 5], [9, 9, 0, 202, 5]])


def classes(model) -> dict:
    """The methods of all classes of modules."""
    found = {cls for module in model.modules() for cls in type(module).__mro__}
    return {cls: dict(vars(cls)) for cls in found if issubclass(cls, nn.Module)}


@pytest.mark.compiled
@pytest.mark.parametrize("tied", [True, False])
def test_lazy_model(tied):
    """Shapes suffice: nothing of the model is evaluated, and weights may be of any value."""
    model = tiny_model(tied=tied)
    model.update({"model": {"norm": {"weight": mx.full((64,), float("nan"))}}})
    assert find_head(model).tied == tied

    def logits(tokens):
        find_head(model)
        return model(tokens)

    assert mx.compile(logits)(TOKENS).shape[-1] == 203


class Wrapped(nn.Module):
    """A model around a model, some of whose logits pass through more than the head."""

    def __init__(self, model, after):
        super().__init__()
        self.language_model = model
        self.after = after

    def __call__(self, tokens, cache=None):
        return self.after(self, self.language_model(tokens, cache))


def test_heads_that_cannot_be_served_are_refused():
    """But one of a nested model that gives a tuple is found."""
    model = Wrapped(tiny_model(tied=False), lambda self, logits: (logits, None))
    assert find_head(model).path == "language_model.lm_head"

    def again(self, logits):
        return logits + self.language_model.lm_head(mx.zeros((1, 1, 64)))

    with pytest.raises(ValueError, match="uses its output projection more than once per token"):
        find_head(Wrapped(tiny_model(tied=False), again))


class Special(nn.Linear):
    """Its product is its parent's, which must not be counted twice, after a change."""

    change = staticmethod(lambda product: product)

    def __call__(self, hidden):
        return self.change(super().__call__(hidden))


class Inheriting(nn.Linear):
    """Has no method of its own, and must have none afterwards."""


def test_layer_that_calls_its_parent_and_classes_as_they_were():
    model = tiny_model(tied=False)
    head = Special(64, 203, bias=False)
    model.lm_head = head
    model.model.layers[0].mlp.gate_proj = Inheriting(64, 128, bias=False)
    before = classes(model)
    location = find_head(model)
    assert classes(model) == before
    assert (location.path, location.module) == ("lm_head", head)
    with pytest.raises(RuntimeError), recorded_hidden(location) as states:
        model(TOKENS)
        assert len(states) == 1
        raise RuntimeError
    assert classes(model) == before
    broken = Wrapped(model, lambda self, logits: logits @ mx.zeros((1, 1)))
    with pytest.raises(ValueError, match="matmul"):
        find_head(broken)
    assert classes(model) == before


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x[..., ::-1]])
def test_special_layers_are_no_plain_product(change):
    layer = Special(64, 203, bias=False)
    layer.change = change
    with pytest.raises(ValueError, match=r"'lm_head' \(Special\) is not a plain product"):
        locate.check_plain_product(HeadLocation(layer, "lm_head", "__call__"))
