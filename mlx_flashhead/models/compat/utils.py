"""``mlx_lm.utils``: downloading, loading, quantizing, sharding and saving."""

from mlx_lm.utils import _download as download
from mlx_lm.utils import (
    dequantize_model,
    load,
    load_adapters,
    quantize_model,
    save,
    sharded_load,
)

try:
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, maybe_set_recommended_wired_limit
except ImportError:
    from . import mlx_lm_0_31 as older

    DEFAULT_ALLOW_PATTERNS = older.DEFAULT_ALLOW_PATTERNS
    maybe_set_recommended_wired_limit = older.maybe_set_recommended_wired_limit
    load, sharded_load = older.checks_code(load), older.checks_code(sharded_load)

__all__ = [
    "DEFAULT_ALLOW_PATTERNS",
    "dequantize_model",
    "download",
    "load",
    "load_adapters",
    "maybe_set_recommended_wired_limit",
    "quantize_model",
    "save",
    "sharded_load",
]
