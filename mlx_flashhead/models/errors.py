"""The one error that callers may want to tell from other mistakes."""


class UnsupportedHeadError(ValueError):
    """A model's output projection cannot be served by FlashHead; mlx-lm can use the model."""
