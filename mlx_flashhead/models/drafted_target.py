"""The target of a trained drafter: its parts, and what drafts cost beside its steps."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .locate import HeadLocation, find_embedding, find_head
from .step_bytes import n_active_experts, step_bytes_of


class DraftedTarget:
    """The parts of a model of mlx-lm that a drafter uses.

    Attributes:
        model: The model.
        embedding: Embeds its tokens.
        scale: By which the embeddings are multiplied.
        head: Where it makes its logits.
        nbytes: Of the weights that a step reads.
        n_active: The experts of a layer that a token reads.
    """

    def __init__(self, model: nn.Module):
        whole: Any = model
        self.model: Any = model
        self.embedding, holder = find_embedding(model)
        self.scale = float(getattr(holder, "embed_scale", 1.0))
        self.head: HeadLocation = find_head(model)
        self.n_active = n_active_experts(whole.args)
        self.nbytes = step_bytes_of(model)

    def dense_logits(self, states: mx.array) -> mx.array:
        """The logits (1, L, V) of states (1, L, D), by the head as it is called at the time."""
        logits: mx.array = getattr(self.head.module, self.head.method)(states)
        return logits
