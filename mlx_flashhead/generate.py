"""``python -m mlx_flashhead.generate``: a shell over `commands/generate.py`."""

from .commands.generate import main

if __name__ == "__main__":
    main()
