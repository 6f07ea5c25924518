"""``mlx_lm.utils``: downloading, loading, quantizing, sharding and saving."""

from mlx_lm.utils import _download as download
from mlx_lm.utils import (
    dequantize_model,
    load_adapters,
    load_tokenizer,
    quantize_model,
    save,
)

try:
    from mlx_lm.utils import (
        DEFAULT_ALLOW_PATTERNS,
        load,
        maybe_set_recommended_wired_limit,
        sharded_load,
    )
except ImportError:
    from .mlx_lm_0_31 import (
        DEFAULT_ALLOW_PATTERNS,
        load,
        maybe_set_recommended_wired_limit,
        sharded_load,
    )
