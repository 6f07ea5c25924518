"""The names of mlx-vlm that may move from one version to the next: a file per module or concern.

Nothing here imports mlx-vlm before a program does, since it is an extra. Tested with mlx-vlm
0.7.8 to 0.7.10. `tests/models/test_vlm_*.py` show what a version has renamed or changed.
"""
