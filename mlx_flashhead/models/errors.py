"""The error that models of mlx-lm and mlx-vlm raise here."""


class UnsupportedHeadError(ValueError):
    """A model's output projection cannot be served by FlashHead; mlx-lm can use the model."""
