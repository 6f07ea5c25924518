"""``python -m mlx_flashhead.export``: a shell over `commands/export.py`."""

from .commands.export import main

if __name__ == "__main__":
    main()
