# ruff: noqa: E402 - without mlx-vlm all of this is skipped
"""Where mlx-vlm reads a head's weights itself: with a FlashHead it asks the layer, or leaves it."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.speculative import eagle3, mtp
from mlx_vlm.speculative.ops import linear

from mlx_flashhead.head.clustered import ClusteredRows
from mlx_flashhead.models.install import detach, get_flash_head
from mlx_flashhead.models.vlm import forward
from retrieval import best_token
from tiny_models import install_index, tiny_index
from vlm_models import tiny_vlm
from vlm_texts import write_alone, write_together


@pytest.fixture
def reads(monkeypatch):
    """How often the rows have been put back into the model's order since, in a list."""
    found = []
    gather = ClusteredRows.token_rows

    def counted(self, token_ids=None):
        if token_ids is None:
            found.append(self)
        return gather(self, token_ids)

    monkeypatch.setattr(ClusteredRows, "token_rows", counted)
    return found


def served(name: str, *, tied: bool, bits: int | None = None) -> nn.Module:
    """A tiny model with a FlashHead, its head quantized or not."""
    model = tiny_vlm(name, tied=tied, bits=bits)
    install_index(model, tiny_index(model, n_probes=3), backend="mlx")
    return model


def hidden_states(model: nn.Module) -> mx.array:
    return mx.random.normal((1, 2, get_flash_head(model).hidden_size), key=mx.random.key(0))


def check_asks_the_layer(reads: list, model: nn.Module, function: Callable) -> None:
    """The function of hidden states gives the FlashHead's logits, and reads no weights."""
    hidden = hidden_states(model)
    head = get_flash_head(model)
    reads.clear()
    with head.settings():
        logits = function(hidden)
        assert not reads
        assert mx.allclose(logits, head(hidden), atol=1e-4)
    assert not mx.allclose(logits, head.dense_logits(hidden), atol=1e-3)


@pytest.mark.parametrize("tied, bits", [(False, None), (False, 4), (True, None), (True, 4)])
def test_verification_of_drafts(reads, bits, tied):
    """Qwen 3.5's own products for it, for the layer of its own and for the tied one."""
    model = served("qwen3_5", tied=tied, bits=bits)
    text = model.language_model
    hidden = hidden_states(model)
    head = get_flash_head(model)
    if tied:
        product = partial(linear._target_verify_embedding_as_linear, text.model.embed_tokens)
    else:
        product = partial(linear._target_verify_linear, text.lm_head)
    check_asks_the_layer(reads, model, text.speculative_logits_from_hidden)
    check_asks_the_layer(reads, model, product)
    with head.settings():
        assert mx.array_equal(text.speculative_argmax_from_hidden(hidden), best_token(head, hidden))
    assert not reads


def test_fused_greedy_decoding_is_left_out(reads):
    model = tiny_vlm("qwen3_5", tied=False, bits=4)
    text = model.language_model
    tokens = mx.array([[3]])
    assert text.fused_greedy_decode(tokens, cache=make_prompt_cache(text)) is not None
    install_index(model, tiny_index(model, n_probes=3), backend="mlx")
    reads.clear()
    assert text.fused_greedy_decode(tokens, cache=make_prompt_cache(text)) is None
    assert not text.supports_fused_greedy_logits_processors([])
    assert not reads


def test_multi_token_prediction(reads):
    """The greedy read-out of a quantized head asks the layer; other layers' stays."""
    model = served("nemotron_h", tied=False, bits=4)
    hidden = hidden_states(model)
    text = model.language_model
    check_asks_the_layer(reads, model, lambda hidden: mtp._mtp_logits_from_hidden(text, hidden))
    assert mtp.decode_quantized_argmax(text.lm_head, hidden) is None
    detach(model)
    tokens = mtp.decode_quantized_argmax(text.lm_head, hidden)
    assert mx.array_equal(tokens, mx.argmax(text.lm_head(hidden), axis=-1))


def test_eagle3_verifies_through_the_layer(reads):
    """Its rows of the draft's tokens are not gathered: the full logits are fewer bytes."""
    draft = SimpleNamespace(d2t=mx.zeros((9,), dtype=mx.int32))
    model = served("gemma4", tied=True)
    reads.clear()
    assert eagle3._eagle3_hot_token_ids(model.language_model, draft, [1]) is None
    assert not reads
    detach(model)
    assert eagle3._eagle3_hot_token_ids(model.language_model, draft, [1]).size == 10


@pytest.mark.parametrize("name, tied, bits", [("qwen3_5", False, 4), ("gemma4", True, None)])
def test_a_token_never_reads_the_weights(reads, name, tied, bits):
    """One text by itself and one of a batch: as many reads for many tokens as for few."""
    model = served(name, tied=tied, bits=bits)
    prompt = [5, 9, 200]
    first = mx.argmax(forward(model, mx.array([prompt]))[:, -1]).item()

    def counted(write, *given):
        reads.clear()
        return write(model, *given), len(reads)

    few, n_few = counted(write_alone, prompt, 2)
    many, n_many = counted(write_alone, prompt, 6)
    assert len(few) == 2
    assert many[:2] == few
    assert many[0] == first
    assert n_few == n_many
    _, n_few = counted(write_together, [prompt], 2)
    same, n_many = counted(write_together, [prompt], 6)
    assert [many] == same
    assert n_few == n_many
