"""``mlx_lm.sample_utils``: what it does not document."""

from mlx_lm.sample_utils import make_logits_processors

__all__ = ["make_logits_processors"]
