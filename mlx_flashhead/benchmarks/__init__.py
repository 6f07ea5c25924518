"""What `mlx_flashhead.benchmark` times: a head, a model, servers. Each is a file."""
