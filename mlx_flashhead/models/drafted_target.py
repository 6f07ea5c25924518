"""The target of a trained drafter: its parts, and what drafts cost beside its steps."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .locate import HeadLocation, find_embedding, find_head

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class DraftedTarget:
    """The parts of a model of mlx-lm that a drafter uses.

    Attributes:
        model: The model.
        embedding: Embeds its tokens.
        scale: By which the embeddings are multiplied.
        head: Where it makes its logits.
        nbytes: Of the weights that a step reads.
        head_nbytes: Of the head's among them.
    """

    def __init__(self, model: nn.Module):
        whole: Any = model
        self.model: Any = model
        self.embedding, holder = find_embedding(model)
        self.scale = float(getattr(holder, "embed_scale", 1.0))
        self.head: HeadLocation = find_head(model)
        rows = self.head.rows().arrays().values()
        self.head_nbytes = sum(array.nbytes for array in rows)
        self.n_active = _n_active(whole.args)
        self.nbytes = self.head_nbytes
        for module in model.modules():
            if module is not self.head.module and not isinstance(module, EMBEDDINGS):
                self.nbytes += nbytes_read(module, self.n_active)

    def dense_logits(self, states: mx.array) -> mx.array:
        """The logits (1, L, V) of states (1, L, D), by the head as it is called at the time."""
        logits: mx.array = getattr(self.head.module, self.head.method)(states)
        return logits


def nbytes_read(module: nn.Module, n_active: int) -> int:
    """The bytes of a module's own arrays that a token reads; of experts, of the active ones."""
    nbytes = 0.0
    for array in dict.values(module):
        if isinstance(array, mx.array):
            share = 1.0
            if array.ndim == 3:
                share = min(1.0, n_active / len(array))
            nbytes += array.nbytes * share
    return round(nbytes)


def _n_active(args: Any) -> int:
    """The experts of a layer that a token reads."""
    known = vars(args) | (getattr(args, "text_config", None) or {})
    return int(known.get("num_experts_per_tok") or 1)
