"""The kinds of `mlx_flashhead.benchmark`, each named like its file: its docstring is its help.

It has an ``add_arguments(parser)`` and a ``run(args)``. `..report` runs its rounds.
"""
