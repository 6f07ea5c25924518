"""Where mlx-lm is touched: finding a model's head, installing a FlashHead, loading, generating."""
