"""The names of mlx-lm that may move from one version to the next.

There is a file for each module of mlx-lm. Tested with mlx-lm 0.31.3 to 0.32.2 and mlx 0.32.1 to
0.32.4.
"""
