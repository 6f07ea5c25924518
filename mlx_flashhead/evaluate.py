"""``python -m mlx_flashhead.evaluate``: a shell over `commands/evaluate.py`."""

from .commands.evaluate import main

if __name__ == "__main__":
    main()
