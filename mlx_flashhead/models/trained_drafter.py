"""Drafters that were trained with their targets: MTP layers, and Gemma 4's assistants.

Their classes are mlx-vlm's. They draft for models that mlx-lm loads.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from ..common.command import from_extra
from .compat import mlx_vlm as compat
from .drafted_target import DraftedTarget
from .fetch import reason
from .step_bytes import EMBEDDINGS, nbytes_read

CONFIG = "config.json"
_LIKE_A_DRAFTERS = re.compile("mtp|assistant|dflash|dspark|eagle", re.IGNORECASE)


class Shape(NamedTuple):
    """What must agree between a drafter and its target. None and "" are not known.

    Attributes:
        family: Such as "qwen3_5".
        hidden_size: Numbers of a state.
        vocab_size: Tokens.
    """

    family: str
    hidden_size: int | None
    vocab_size: int | None

    def fits(self, target: "Shape") -> bool:
        """Whether a drafter of this shape may draft for a target."""
        shorter, longer = sorted((self.family, target.family), key=len)
        if not longer.startswith(shorter):
            return False
        if self.hidden_size is not None and target.hidden_size not in (None, self.hidden_size):
            return False
        return self.vocab_size is None or target.vocab_size in (None, self.vocab_size)

    def __str__(self) -> str:
        return (
            f"{self.family or 'unknown'} with states of {self.hidden_size or 0:,} numbers and "
            f"{self.vocab_size or 0:,} tokens"
        )


class TrainedDrafter:
    """A drafter that was trained with its target. :meth:`check_target` says whether it was.

    Args:
        module: Of mlx-vlm.
        config: Its config.json.
        source: Its folder or repository, for messages.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any], source: str):
        self.module = module
        self.source = source
        self._target: DraftedTarget | None = None
        self._shape = _shape_of_drafter(config)
        self.name = "assistant"
        if "mtp" in config["model_type"]:
            self.name = "MTP"

    @property
    def has_own_head(self) -> bool:
        """Whether it makes its logits by rows of its own."""
        modules = self.module.modules()
        return "lm_head" in self.module or any(isinstance(each, EMBEDDINGS) for each in modules)

    def target(self, model: nn.Module) -> DraftedTarget:
        """The parts of a model, found once."""
        if self._target is None or self._target.model is not model:
            self._target = DraftedTarget(model)
        return self._target

    def cost(self, target: DraftedTarget, head_share: float) -> float:
        """Estimates the time of a draft, relative to a step of its target, by the bytes of both.

        Args:
            target: Its target.
            head_share: Of the target's head that a draft reads.
        """
        parts = self.module.modules()
        # Such a drafter scores few rows by itself.
        if "masked_embedding" in self.module:
            parts = [each for each in parts if not isinstance(each, EMBEDDINGS)]
        nbytes: float = sum(nbytes_read(each, target.n_active) for each in parts)
        if not self.has_own_head:
            nbytes += head_share * target.nbytes.head
        return nbytes / target.nbytes.all()

    def make_cache(self) -> list[Any]:
        """New caches of its layers; none of a drafter that reads its target's."""
        module: Any = self.module
        return list(module.make_cache())

    def check_target(self, model: nn.Module) -> None:
        """Checks that it may draft for a model.

        Raises:
            ValueError: If it was trained with another one.
        """
        whole: Any = model
        _check_fits(self._shape, vars(whole.args), self.source, "this model")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json; empty if it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    return config


def is_trained_drafter(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a drafter that reads the states of its target."""
    names = [config.get("model_type"), *(config.get("architectures") or ())]
    return any(_LIKE_A_DRAFTERS.search(str(name)) for name in names)


def check_drafter(
    config: dict[str, Any], source: str, target_config: dict[str, Any], target: str
) -> None:
    """Checks the configuration of a drafter, before anything is loaded.

    Args:
        config: The drafter's config.json.
        source: Its name.
        target_config: The target's config.json.
        target: Its name.

    Raises:
        ValueError: If such drafters cannot be had, or if it is another model's.
    """
    _check_kind(config, source)
    _check_fits(_shape_of_drafter(config), target_config, source, target)


def load_trained_drafter(folder: Path, source: str) -> TrainedDrafter:
    """Loads a drafter.

    Args:
        folder: Its folder.
        source: Its name.

    Raises:
        ValueError: If such drafters cannot be had, or mlx-vlm cannot load it.
    """
    config = read_config(folder)
    _check_kind(config, source)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"The drafter {source} has no weights (*.safetensors): check or fetch it again."
        )
    # mlx-vlm's code of drafters, and of damaged settings, raises any type.
    try:
        module = compat.load_drafter(folder)
    except Exception as error:
        raise ValueError(
            f"mlx-vlm cannot load the drafter {source} ({reason(error)}): check or fetch it again."
        ) from error
    return TrainedDrafter(module, config, source)


def check_installed(what: str) -> None:
    """Raises a ValueError that names the remedy if mlx-vlm is missing, which ``what`` needs."""
    from_extra("mlx_vlm", "drafters", what)


def _check_kind(config: dict[str, Any], source: str) -> None:
    check_installed(f"The drafter {source}")
    model_type = config.get("model_type")
    available = compat.available_drafters()
    if model_type not in available:
        raise ValueError(
            f"{source} is a drafter of the kind {model_type!r}, which cannot draft for a model of "
            f"mlx-lm: give one of {', '.join(available)}, or a smaller model of the same family."
        )
    # It is code, which mlx-vlm would run.
    if "model_file" in config:
        raise ValueError(f"{source} brings Python code of its own: choose another drafter.")


def _check_fits(
    drafter: Shape, target_config: dict[str, Any], source: str, target_name: str
) -> None:
    target = _shape(target_config)
    if not drafter.fits(target):
        raise ValueError(
            f"{source} drafts for {drafter}, and {target_name} is {target}: give the drafter that "
            "was trained with it."
        )


def _shape(config: dict[str, Any]) -> Shape:
    """The shape of a model, or of the text's side of it."""
    text = _text_config(config) or config
    family = str(text.get("model_type") or config.get("model_type") or "").removesuffix("_text")
    sizes = [text.get(name) or config.get(name) for name in ("hidden_size", "vocab_size")]
    return Shape(family, *sizes)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {}
    return text


def _shape_of_drafter(config: dict[str, Any]) -> Shape:
    """The shape of the targets that a drafter was trained with."""
    text = _text_config(config)
    own = re.sub("_(unified_assistant|assistant|mtp)$", "", str(config.get("model_type")))
    shape = _shape({"text_config": {"model_type": own} | text})
    widths = [config.get(name) for name in ("backbone_hidden_size", "target_hidden_size")]
    return shape._replace(hidden_size=next(filter(None, widths), shape.hidden_size))
