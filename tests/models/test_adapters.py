"""LoRA and DoRA adapters of the body work; those of the head must be fused first."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_flashhead import load
from model_pair import uncached
from refusals import refused
from tiny_adapters import write_adapters

PROMPT = "How do I bake bread"
HEADS = {"tied": "model.embed_tokens", "untied": "lm_head"}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_the_body_work_and_those_of_the_head_are_refused(pair, tmp_path, kind):
    adapters = str(write_adapters(tmp_path / "adapters", pair.dense_folder, kind=kind))
    dense, _ = mlx_lm.load(str(pair.dense_folder), adapter_path=adapters)
    model, _ = load(str(pair.folder), adapter_path=adapters)
    ids = pair.encode(PROMPT)
    assert uncached(dense, ids) != uncached(pair.dense, ids)
    assert pair.tokens(model, ids) == uncached(dense, ids) != uncached(model, ids)
    path = HEADS["tied" if pair.model.args.tie_word_embeddings else "untied"]
    adapters = str(write_adapters(tmp_path / "head", pair.dense_folder, kind=kind, keys=(path,)))
    refused(
        lambda: load(str(pair.folder), adapter_path=adapters),
        f"{path!r} carries a LoRA adapter.* must be fused first",
    )


def test_fully_tuned_weights(pair, tmp_path):
    """Adapters of the kind "full" are weights: those of the body fit, another head does not."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    file = str(folder / "adapters.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    changed = dict(tree_flatten(pair.dense.parameters()))[name] * -1
    mx.save_safetensors(file, {name: changed})
    ids = pair.encode(PROMPT)
    dense, _ = mlx_lm.load(str(pair.dense_folder), adapter_path=str(folder))
    model, _ = load(str(pair.folder), adapter_path=str(folder))
    assert pair.tokens(model, ids) == uncached(dense, ids) != uncached(pair.dense, ids)
    head = HEADS["tied" if pair.model.args.tie_word_embeddings else "untied"] + ".weight"
    mx.save_safetensors(file, {head: dict(tree_flatten(pair.dense.parameters()))[head] * 2})
    with pytest.raises(ValueError, match="belongs to other rows than this model's"):
        load(str(pair.folder), adapter_path=str(folder))
