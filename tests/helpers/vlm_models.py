"""Tiny models of every architecture of mlx-vlm that writes text."""

import importlib
import inspect
import pkgutil
from copy import deepcopy
from functools import cache
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm import models
from mlx_vlm.utils import update_module_configs

from architecture_configs import COMMON, OVERRIDES
from architecture_models import TYING_FLAGS, stirred
from mlx_flashhead.models.locate import find_head
from vlm_configs import IMAGE_TOKEN, IMAGE_TOKENS, PICTURES, VISION, VLM_OVERRIDES

PARTS = ("text", "vision", "perceiver", "projector", "audio")
# mlx-vlm asks for a configuration's signature once for each of its keys.
_cached_signatures = mock.patch.object(inspect, "signature", cache(inspect.signature))


def vlm_architectures() -> list[str]:
    """The names of mlx-vlm's architectures that take text and make logits."""
    packages = (found.name for found in pkgutil.iter_modules(models.__path__) if found.ispkg)
    names = []
    for name in packages:
        model = getattr(importlib.import_module(f"mlx_vlm.models.{name}"), "Model", None)
        if hasattr(model, "get_input_embeddings"):
            names.append(name)
    return sorted(names)


@_cached_signatures
def tiny_vlm(name: str, *, tied: bool, bits: int | None = None, seed: int = 0) -> nn.Module:
    """A random float32 model of a few layers, not evaluated; some do not care for ``tied``.

    ``bits`` quantizes its head alone, where that can be.
    """
    package = importlib.import_module(f"mlx_vlm.models.{name}")
    config = vlm_config(name, tied)
    made = package.ModelConfig.from_dict(config)
    made = update_module_configs(made, package, config, list(PARTS))
    mx.random.seed(seed)
    model = package.Model(made)
    # 0.7.10 writes them into the batch, far beyond its end.
    if name == "phi3small":
        model.language_model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)
    # It is tied where the checkpoint has no head.
    if tied and name == "recurrent_gemma":
        model.language_model.sanitize({})
    stirred(model)
    if bits is not None:
        module = find_head(model).module
        # The head of this one stays as it was.
        if hasattr(module, "to_quantized") and name != "muse_spark":
            nn.quantize(model, 32, bits, class_predicate=lambda _, other: other is module)
    return model


def vlm_config(name: str, tied: bool) -> dict:
    """The small config.json of an architecture."""
    own = VLM_OVERRIDES.get(name, {})
    text = OVERRIDES.get(name, {})
    if callable(text):
        text = text(tied)
    text = text | own.get("text", {})
    config = COMMON | IMAGE_TOKENS | dict.fromkeys(TYING_FLAGS, tied) | {"model_type": name} | text
    parts = {f"{name}_config": VISION | own.get(name, {}) for name in ("vision", "audio")}
    parts |= {"text_config": config | own.get("text_config", {})}
    parts |= {"projector_config": {}, "perceiver_config": {}}
    if own.get("exact"):
        package = importlib.import_module(f"mlx_vlm.models.{name}")
        for part, known in (("text_config", "TextConfig"), ("vision_config", "VisionConfig")):
            fields = getattr(package, known).__dataclass_fields__
            parts[part] = {key: value for key, value in parts[part].items() if key in fields}
    # These are of models that also speak.
    nested = {"thinker_config": parts, "talker_config": parts}
    # A copy, since some architectures change their configuration.
    return deepcopy(config | parts | nested | own.get("whole", {}))


def picture(name: str, seed: int = 0) -> tuple[mx.array, dict[str, Any]]:
    """Token ids with a random picture among them, and the picture as the architecture takes it."""
    form, n_tokens = PICTURES[name]
    mx.random.seed(seed)
    pixels = mx.random.normal((1, 3, 28, 28))
    patches = mx.random.normal((4, 3 * 14 * 14))
    grid = mx.array([[1, 2, 2]])
    square = mx.array([[2, 2]])
    mask = mx.ones((1, 4), mx.int32)
    values, further = {
        "pixels": (pixels, {}),
        "tiles": (pixels[None], {}),
        "sized": (pixels, {"image_sizes": mx.array([[28, 28]])}),
        "patches": (patches, {"image_grid_thw": grid}),
        "two frames": (mx.tile(patches, (1, 2)), {"image_grid_thw": grid}),
        "squares": (patches.reshape(4, 3, 14, 14), {"image_grid_hws": square}),
        "packed": (patches[None], {"spatial_shapes": square, "pixel_attention_mask": mask}),
    }[form]
    tokens = mx.array([[5, 7, *([IMAGE_TOKEN] * n_tokens), *range(9, 16)]])
    return tokens, {"pixel_values": values} | further
