"""Where mlx-lm and mlx-vlm are touched: finding a head, installing, loading, generating."""
