"""An error that callers may handle by itself."""


class UnsupportedHeadError(ValueError):
    """A model's output projection cannot be served by FlashHead; mlx-lm can use the model."""
