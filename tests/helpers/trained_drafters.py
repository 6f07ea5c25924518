"""Tiny models of mlx-lm with tiny trained drafters of mlx-vlm, all of random weights."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from architecture_configs import COMMON, HIDDEN_SIZE
from architecture_models import OVERRIDES, stirred, tiny_architecture
from mlx_flashhead.models.locate import find_head
from mlx_flashhead.models.trained_drafter import TrainedDrafter

DENSE = {"num_experts": 0}
ROPE = {
    "type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 2, 2],
    "partial_rotary_factor": 0.5,
}
# By family: its architecture in mlx-lm, what differs from the common configuration, and its
# drafter's kind.
FAMILIES = {
    "qwen3_5": ("qwen3_5", DENSE | {"rope_parameters": ROPE}, "qwen3_5_mtp"),
    "qwen3_5_moe": ("qwen3_5_moe", {"rope_parameters": ROPE}, "qwen3_5_mtp"),
    "glm_moe_dsa": ("glm_moe_dsa", {}, "glm_moe_dsa_mtp"),
    "nemotron_h": ("nemotron_h", {}, "nemotron_h_mtp"),
    "gemma4": ("gemma4", {"num_kv_shared_layers": 0}, "gemma4_assistant"),
}


def tiny_target(family: str, *, tied: bool = False, seed: int = 0, **changes) -> nn.Module:
    """A random model of mlx-lm."""
    name, own, _ = FAMILIES[family]
    return tiny_architecture(name, tied=tied, seed=seed, **own | changes)


def drafter_config(family: str) -> dict:
    """The config.json of its drafter."""
    name, own, kind = FAMILIES[family]
    overrides = OVERRIDES.get(name, {})
    text = COMMON | overrides | own | {"model_type": f"{name}_text"}
    config = {"model_type": kind, "text_config": text, "block_size": 4}
    text |= {"mtp_num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    if kind == "nemotron_h_mtp":
        text |= {"mtp_hybrid_override_pattern": "*E", "model_type": "nemotron_h"}
    if kind == "gemma4_assistant":
        config |= {"backbone_hidden_size": text["hidden_size"]}
        text |= {"hidden_size": 32}
    return config


def tiny_module(family: str, seed: int = 0) -> nn.Module:
    """A random drafter of mlx-vlm."""
    return _module(drafter_config(family), seed)


def _module(config: dict, seed: int) -> nn.Module:
    package = importlib.import_module(f"mlx_vlm.speculative.drafters.{config['model_type']}")
    mx.random.seed(seed)
    module = package.Model(package.ModelConfig.from_dict(config))
    return stirred(module)


def tiny_drafter(family: str, seed: int = 0) -> TrainedDrafter:
    """A random drafter."""
    return TrainedDrafter(tiny_module(family, seed), drafter_config(family), f"tiny/{family}")


def write_drafter(folder: Path, family: str, **changes) -> Path:
    """A folder with a random drafter. ``changes`` are of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = dict(tree_flatten(tiny_module(family).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    config = drafter_config(family) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def exact_pair(family: str, *, noise: float = 0.0, seed: int = 0, **changes):
    """A model whose next token follows from its latest one, and a drafter that knows it.

    The model's layers add nothing to the embedding of a token, and the drafter passes it on.

    Args:
        family: Theirs.
        noise: Of the drafter's embeddings. With some, a part of its drafts is wrong.
        seed: Of the weights.
        **changes: Of the model's configuration.
    """
    model = tiny_target(family, seed=seed, **changes)
    config = drafter_config(family)
    # It is as wide as its target, whose head it has.
    if family == "gemma4":
        config |= {"tie_word_embeddings": False}
        config["text_config"] |= {"hidden_size": HIDDEN_SIZE}
    config["text_config"] |= changes
    module = _module(config, seed)
    adds_nothing(model)
    adds_nothing(module)
    weights = dict(tree_flatten(module.parameters()))
    (entry,) = (name for name in weights if name.endswith(ENTRIES))
    width = weights[entry].shape[0]
    passing = mx.concatenate([mx.eye(width), mx.zeros((width, width))], axis=1)
    mx.random.seed(seed + 1)
    changed = {entry: passing + noise * mx.random.normal(passing.shape) * (passing > 0)}
    if family == "gemma4":
        changed["lm_head.weight"] = find_head(model).module["weight"]
    module.load_weights(list(changed.items()), strict=False)
    return model, TrainedDrafter(module, config, f"exact/{family}")


ENTRIES = ("fc.weight", "eh_proj.weight", "pre_projection.weight")
OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
OUTPUTS += ("per_layer_projection.weight",)


def adds_nothing(model: nn.Module) -> None:
    """Sets the last matrices of all layers to zero, and all norms to one."""
    changed = {}
    for name, array in tree_flatten(model.parameters()):
        if name.endswith(OUTPUTS):
            changed[name] = mx.zeros_like(array)
        elif "norm" in name:
            changed[name] = mx.ones_like(array)
    model.load_weights(list(changed.items()), strict=False)
