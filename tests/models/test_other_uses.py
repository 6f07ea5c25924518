"""The head's layer, asked for something else than logits, answers as the dense one does."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from architecture_configs import VOCAB_SIZE
from architecture_models import tiny_architecture
from mlx_flashhead.models.install import get_flash_head
from tiny_models import install_index, tiny_index, tiny_model


def installed(model):
    install_index(model, tiny_index(model, n_probes=2))
    return model


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4"])
def test_tokens_are_found_by_their_embeddings(name):
    """As gemma4 finds the inputs of its layers where it is given embeddings alone."""
    dense, flash = (tiny_architecture(name, tied=True) for _ in range(2))
    installed(flash)
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


@pytest.mark.parametrize("length", [1, 9])
def test_a_plain_call_is_the_dense_one(length):
    """For evaluation, perplexity, and every loop that does not know of a FlashHead."""
    dense, flash = tiny_model(), installed(tiny_model())
    tokens = mx.array([[(13 * i) % 200 for i in range(length)]])
    assert mx.allclose(flash(tokens), dense(tokens), atol=1e-5)
