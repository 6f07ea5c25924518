"""Drafters of mlx-vlm on a model with a FlashHead: the text is that without one."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.speculative.drafters.eagle3.config import Eagle3Config
from mlx_vlm.speculative.drafters.eagle3.eagle3 import Eagle3DraftModel
from mlx_vlm.speculative.drafters.gemma4_assistant.config import Gemma4AssistantConfig
from mlx_vlm.speculative.drafters.gemma4_assistant.gemma4_assistant import Gemma4AssistantDraftModel
from mlx_vlm.speculative.drafters.qwen3_5_mtp.config import Qwen3_5MTPConfig
from mlx_vlm.speculative.drafters.qwen3_5_mtp.qwen3_5_mtp import Qwen3_5MTPDraftModel
from mlx_vlm.speculative.drafters.qwen3_dflash.config import DFlashConfig
from mlx_vlm.speculative.drafters.qwen3_dflash.dflash import DFlashDraftModel

from mlx_flashhead.head.clustered import ClusteredRows
from tiny_models import install_index, tiny_index
from vlm_models import tiny_vlm
from vlm_texts import write_alone, write_together

PROMPT = [5, 9, 200]
TOKENS = 12
write = partial(write_alone, prompt=PROMPT, max_tokens=TOKENS)


def mtp(target: nn.Module) -> nn.Module:
    return Qwen3_5MTPDraftModel(Qwen3_5MTPConfig(text_config=target.config.text_config))


def layer_of(target: nn.Module) -> dict[str, int]:
    """The shape of a drafter's layer."""
    text = target.config.text_config
    return {
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }


def dflash(target: nn.Module) -> nn.Module:
    config = DFlashConfig(
        **layer_of(target),
        num_hidden_layers=1,
        num_target_layers=2,
        target_layer_ids=[0, 1],
        head_dim=32,
        block_size=4,
        mask_token_id=0,
    )
    return DFlashDraftModel(config)


def eagle3(target: nn.Module) -> nn.Module:
    layer = layer_of(target)
    config = Eagle3Config(
        transformer_layer_config=layer,
        tie_word_embeddings=True,
        block_size=4,
        target_layer_ids=[1, 2],
        draft_vocab_size=layer["vocab_size"],
    )
    drafter = Eagle3DraftModel(config)
    # It reads the states of two layers.
    drafter.fc = nn.Linear(2 * layer["hidden_size"], layer["hidden_size"], bias=False)
    return drafter


def assistant(target: nn.Module) -> nn.Module:
    text = target.config.text_config
    options = {"backbone_hidden_size": text.hidden_size, "text_config": text}
    return Gemma4AssistantDraftModel(Gemma4AssistantConfig(**options))


# Drafters with the kind of their loop, on a target.
CASES = [
    (mtp, "mtp", "qwen3_5", False, 4),
    (mtp, "mtp", "qwen3_5", True, None),
    (dflash, "dflash", "qwen3_5", False, 4),
    (dflash, "dflash", "qwen3_5", True, None),
    (eagle3, "eagle3", "gemma4", True, None),
    # This one has a head of its own.
    (assistant, "mtp", "gemma4", True, None),
]


@pytest.fixture
def calls(monkeypatch):
    """Names of what was computed since, in a list."""
    found = []

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            # Without token ids it reads the rows of all tokens.
            if len(arguments) == 1:
                found.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counted(ClusteredRows, "token_rows")
    return found


@pytest.mark.parametrize("make, kind, name, tied, bits", CASES)
def test_text_is_the_dense_models(calls, make, kind, name, tied, bits):
    model = tiny_vlm(name, tied=tied, bits=bits)
    mx.random.seed(1)
    drafter = make(model)
    drafter.eval()
    drafting = {"draft_model": drafter, "draft_kind": kind}
    dense = write(model)
    assert write(model, **drafting) == dense
    accepted = list(drafter.accept_lens)
    install_index(model, tiny_index(model), backend="mlx")
    calls.clear()
    assert write(model, **drafting) == dense
    assert drafter.accept_lens == accepted
    # The shapes alone are read, as the drafter is met and bound.
    assert calls.count("token_rows") <= 4


def test_several_texts_at_once():
    model = tiny_vlm("qwen3_5", tied=True)
    dense = write(model)
    install_index(model, tiny_index(model), backend="mlx")
    options = {"draft_model": mtp(model), "draft_kind": "mtp"}
    assert write_together(model, [PROMPT, PROMPT], TOKENS, **options) == [dense, dense]
