"""The names of `loading`, `templates`, `vlm` and `errors` in one place."""

from .errors import UnsupportedHeadError
from .loading import UNKNOWN_CONTEXT, context_of, load_dense, load_dense_part
from .templates import apply_template, prompt_of, template_variables
from .vlm import ProcessorText, architecture, embeddings, forward, is_vlm, text_side

__all__ = [
    "UNKNOWN_CONTEXT",
    "ProcessorText",
    "UnsupportedHeadError",
    "apply_template",
    "architecture",
    "context_of",
    "embeddings",
    "forward",
    "is_vlm",
    "load_dense",
    "load_dense_part",
    "prompt_of",
    "template_variables",
    "text_side",
]
