"""``python -m mlx_flashhead.upload``: a shell over `commands/upload.py`."""

from .commands.upload import main

if __name__ == "__main__":
    main()
