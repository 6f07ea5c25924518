"""A model whose folder brings its own Python code."""

import json
from pathlib import Path

from model_folders import write_model

CODE = """
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama


@dataclass
class ModelArgs(llama.ModelArgs):
    logit_cap: float = 10.0


class Model(nn.Module):
    # a llama whose logits are capped, under other names

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.body = llama.LlamaModel(args)
        self.output = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        logits = self.output(self.body(inputs, cache))
        return self.args.logit_cap * mx.tanh(logits / self.args.logit_cap)

    def sanitize(self, weights):
        names = {"model.": "body.", "lm_head.": "output."}
        return {
            next((new + k[len(old):] for old, new in names.items() if k.startswith(old)), k): v
            for k, v in weights.items()
        }

    @property
    def layers(self):
        return self.body.layers
"""


def write_remote_model(folder: Path) -> Path:
    """Writes a tiny one; its logits are capped at 8."""
    write_model(folder, tied=False, hidden_size=128)
    further = {"model_type": "of_its_own", "model_file": "own_model.py", "logit_cap": 8.0}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | further))
    (folder / "own_model.py").write_text(CODE)
    return folder
