"""``mlx_lm.sample_utils``: undocumented names."""

from mlx_lm.sample_utils import greedy_sampler, make_logits_processors, make_sampler

__all__ = ["greedy_sampler", "make_logits_processors", "make_sampler"]
