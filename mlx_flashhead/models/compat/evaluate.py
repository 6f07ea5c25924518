"""``mlx_lm.evaluate``: its adapter to lm-eval, which the extra "tasks" installs."""

import importlib
from typing import Any

import mlx.nn as nn
from mlx_lm.evaluate import MLXLM, chat_template_fn

from .patching import replaced

module = importlib.import_module("mlx_lm.evaluate")


class Adapter(MLXLM):
    """mlx-lm's adapter on a loaded model. mlx-lm's own takes a path only."""

    def __init__(self, model: nn.Module, tokenizer: Any, **options: Any):
        with replaced(module, load=lambda *_, **__: (model, tokenizer)):
            super().__init__("", **options)
