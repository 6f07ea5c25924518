"""The names of mlx-lm that may move from one version to the next: a file per module of mlx-lm.

What ``mlx_lm`` itself exports and its samplers (``mlx_lm.sample_utils``) are used wherever they are
needed. Everything else that is imported from its modules by name comes through here, and so does
whatever is put in the place of its own: tested with mlx-lm 0.32.0 to 0.32.2.
`tests/models/test_compat.py` says which names a version has renamed or changed, and what uses them.
"""
