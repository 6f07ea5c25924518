"""The names of mlx-lm that may move from one version to the next: a file per module of mlx-lm.

Other modules import ``mlx_lm`` itself and its samplers (``mlx_lm.sample_utils``) directly. Every
other name of mlx-lm comes through here, and so does every replacement of one. Tested with mlx-lm
0.32.0 to 0.32.2. `tests/models/test_compat.py` reports the names that a version has renamed or
changed, and their users here.
"""
