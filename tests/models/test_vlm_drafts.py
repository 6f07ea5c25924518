"""Drafters of mlx-vlm on a model with a FlashHead: the text is that without one."""

from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

pytest.importorskip("mlx_vlm")

from mlx_vlm.speculative.drafters.eagle3.config import Eagle3Config
from mlx_vlm.speculative.drafters.eagle3.eagle3 import Eagle3DraftModel
from mlx_vlm.speculative.drafters.gemma4_assistant.config import Gemma4AssistantConfig
from mlx_vlm.speculative.drafters.gemma4_assistant.gemma4_assistant import Gemma4AssistantDraftModel
from mlx_vlm.speculative.drafters.qwen3_5_mtp.config import Qwen3_5MTPConfig
from mlx_vlm.speculative.drafters.qwen3_5_mtp.qwen3_5_mtp import Qwen3_5MTPDraftModel
from mlx_vlm.speculative.drafters.qwen3_dflash.config import DFlashConfig
from mlx_vlm.speculative.drafters.qwen3_dflash.dflash import DFlashDraftModel

from mlx_flashhead.conversion import calibration
from mlx_flashhead.head.clustered import ClusteredRows
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.index.files import write_companion
from mlx_flashhead.loading import sources as cache
from mlx_flashhead.loading.load import attach
from mlx_flashhead.models.install import detach, get_flash_head
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


def eagle3(target: nn.Module, n_tokens: int | None = None) -> nn.Module:
    layer = layer_of(target)
    config = Eagle3Config(
        transformer_layer_config=layer,
        tie_word_embeddings=True,
        block_size=4,
        target_layer_ids=[1, 2],
        draft_vocab_size=n_tokens or layer["vocab_size"],
    )
    drafter = Eagle3DraftModel(config)
    drafter.fc = nn.Linear(2 * layer["hidden_size"], layer["hidden_size"], bias=False)  # two layers
    return drafter


def assistant(target: nn.Module, **options) -> nn.Module:
    text = target.config.text_config
    options |= {"backbone_hidden_size": text.hidden_size, "text_config": text}
    return Gemma4AssistantDraftModel(Gemma4AssistantConfig(**options))


# drafters with the kind of their loop, on a target
CASES = [
    (mtp, "mtp", "qwen3_5", False, 4),
    (mtp, "mtp", "qwen3_5", True, None),
    (dflash, "dflash", "qwen3_5", False, 4),
    (dflash, "dflash", "qwen3_5", True, None),
    (eagle3, "eagle3", "gemma4", True, None),
]
# with a head of their own, and whether that is a layer by itself
OWN = [
    (partial(eagle3, n_tokens=128), "eagle3", True),
    (assistant, "mtp", False),
    (partial(assistant, tie_word_embeddings=False), "mtp", True),
]


@pytest.fixture
def calls(monkeypatch):
    """Names of what was computed since, in a list."""
    found = []

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            if name != "token_rows" or len(arguments) == 1:  # of all tokens
                found.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counted(FlashHead, "draft_logits")
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
    assert calls.count("token_rows") <= 4  # the shapes alone, as the drafter is met and bound


@pytest.fixture
def attached(tmp_path):
    """Attaches a FlashHead to a target."""

    def attach_to(**options) -> tuple[nn.Module, list[int]]:
        model = tiny_vlm("gemma4", tied=True)
        dense = write(model)
        write_companion(tmp_path, tiny_index(model))
        processor = SimpleNamespace(encode=lambda text: [*text.encode()[:8]], eos_token_id=299)
        attach(model, processor, tmp_path, n_probes=3, backend="mlx", **options)
        return model, dense

    return attach_to


@pytest.mark.parametrize("make, kind, untied", OWN)
def test_a_head_of_the_drafters_own(calls, attached, capfd, monkeypatch, make, kind, untied):
    """It gets a FlashHead too, which is built from its states as it drafts, and cached."""
    monkeypatch.setattr(calibration, "DRAFTED_POSITIONS", 100)
    model, dense = attached()
    for built in (True, False):
        mx.random.seed(1)
        drafter = make(model)
        drafter.update(tree_map(lambda a: mx.random.normal(a.shape), drafter.parameters()))
        drafter.eval()
        calls.clear()
        mx.random.seed(5)
        before = mx.random.uniform().item()
        mx.random.seed(5)
        assert write(model, draft_model=drafter, draft_kind=kind) == dense
        assert mx.random.uniform().item() == before  # the state of the user's own draws
        said = capfd.readouterr().err
        assert ("Building the FlashHead of" in said) == built
        assert "no FlashHead" not in said
        assert [entry.config.calibration["source"] for entry in cache.entries()] == ["drafts"]
        assert "draft_logits" in calls
        layer = drafter.lm_head if untied else drafter.model.embed_tokens
        head = get_flash_head(layer)
        assert head.vocab_size == layer.weight.shape[0]
        assert head.n_probes < head.n_clusters
    detach(model)
    assert write(model, draft_model=drafter, draft_kind=kind) == dense


RETRIEVES = {"use_ordered_embeddings": True, "num_centroids": 43, "centroid_intermediate_top_k": 2}


@pytest.mark.parametrize("build, options", [(False, {}), (True, RETRIEVES)])
def test_a_head_of_its_own_stays_dense(calls, attached, build, options):
    """Where nothing may be built, and of a drafter that retrieves itself."""
    model, dense = attached(build=build)
    drafter = assistant(model, **options)
    assert write(model, draft_model=drafter, draft_kind="mtp") == dense
    assert get_flash_head(drafter.model) is None
    assert "draft_logits" not in calls


def test_several_texts_at_once():
    model = tiny_vlm("qwen3_5", tied=True)
    dense = write(model)
    install_index(model, tiny_index(model), backend="mlx")
    options = {"draft_model": mtp(model), "draft_kind": "mtp"}
    assert write_together(model, [PROMPT, PROMPT], TOKENS, **options) == [dense, dense]
