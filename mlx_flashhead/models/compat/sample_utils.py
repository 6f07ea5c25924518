"""``mlx_lm.sample_utils``: undocumented names."""

from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_logits_processors, make_sampler

greedy_sampler = getattr(sample_utils, "greedy_sampler", None)  # new in 0.32
