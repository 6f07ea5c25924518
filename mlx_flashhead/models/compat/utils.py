"""``mlx_lm.utils``: downloading, quantizing, sharding and saving."""

from mlx_lm.utils import (
    DEFAULT_ALLOW_PATTERNS,
    dequantize_model,
    load_adapters,
    maybe_set_recommended_wired_limit,
    quantize_model,
    save,
    sharded_load,
)
from mlx_lm.utils import _download as download

__all__ = [
    "DEFAULT_ALLOW_PATTERNS",
    "dequantize_model",
    "download",
    "load_adapters",
    "maybe_set_recommended_wired_limit",
    "quantize_model",
    "save",
    "sharded_load",
]
