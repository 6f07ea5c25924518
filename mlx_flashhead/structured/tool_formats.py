"""The formats in which models write calls of tools: one for each of mlx-lm's tool parsers."""

from typing import Any

from .call_format import CallFormat
from .object_calls import (
    FunctionGemma,
    Gemma4,
    JsonTools,
    KimiK2,
    KimiK3,
    Mistral,
    Pythonic,
)
from .tagged_calls import Glm47, Longcat, MiniCpm5, MinimaxM2, MuseSpark, Qwen3Coder

FORMATS: dict[str, type[CallFormat]] = {
    "function_gemma": FunctionGemma,
    "gemma4": Gemma4,
    "glm47": Glm47,
    "json_tools": JsonTools,
    "kimi_k2": KimiK2,
    "kimi_k3": KimiK3,
    "laguna": Glm47,
    "longcat": Longcat,
    "minicpm5": MiniCpm5,
    "minimax_m2": MinimaxM2,
    "mistral": Mistral,
    "muse_spark": MuseSpark,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
}


def format_name_of(tokenizer: Any) -> str:
    """The name of the format of a tokenizer's calls: that of mlx-lm's parser for it.

    Raises:
        ValueError: If it has none, or one that is not known here.
    """
    parser = getattr(tokenizer, "tool_parser", None)
    name = getattr(parser, "__module__", "").rpartition(".")[2]
    if name not in FORMATS:
        raise ValueError("The format of this model's calls is not known here.")
    return name
