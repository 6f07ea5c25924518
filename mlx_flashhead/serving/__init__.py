"""The HTTP server: mlx-lm's, with FlashHead models and a page for browsers."""
