"""``mlx_lm.sample_utils``: undocumented names."""

from mlx_lm.sample_utils import make_logits_processors

__all__ = ["make_logits_processors"]
