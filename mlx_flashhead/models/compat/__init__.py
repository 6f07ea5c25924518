"""The names of mlx-lm that may move from one version to the next.

Those that are not public are touched in this folder alone: `caches`, `inner_batch`, `model_code`
and `tokenizers` say what they mean. Tested with mlx-lm 0.31.3 to 0.32.2 and mlx 0.32.1 to 0.32.4.
"""
