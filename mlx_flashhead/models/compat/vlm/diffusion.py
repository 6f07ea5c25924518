"""``mlx_vlm.generate.diffusion``: which models it is for."""

from mlx_vlm.generate.diffusion import is_diffusion_model

__all__ = ["is_diffusion_model"]
