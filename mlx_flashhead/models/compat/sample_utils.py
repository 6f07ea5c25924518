"""``mlx_lm.sample_utils``: undocumented names."""

from mlx_lm.sample_utils import make_logits_processors, make_sampler

try:
    from mlx_lm.sample_utils import greedy_sampler
except ImportError:
    from .mlx_lm_0_31 import greedy_sampler
