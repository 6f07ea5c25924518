"""``python -m mlx_flashhead.benchmark``: a shell over `commands/benchmark.py`."""

from .commands.benchmark import main

if __name__ == "__main__":
    main()
