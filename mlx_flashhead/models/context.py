"""The number of tokens that a model can take."""

from typing import Any

# For a model whose configuration and tokenizer do not give its context.
UNKNOWN_CONTEXT = 32768
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def context_of(config: dict[str, Any], tokenizer: Any) -> int:
    """The number of tokens in a model's context, from its configuration or its tokenizer."""
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 1:
                return part[key]
    length = tokenizer.model_max_length  # transformers writes 1e30 for unknown
    return length if 1 < length <= 2**24 else UNKNOWN_CONTEXT
