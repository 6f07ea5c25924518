"""``python -m mlx_flashhead.convert``: a shell over `commands/convert.py`."""

from .commands.convert import main

if __name__ == "__main__":
    main()
