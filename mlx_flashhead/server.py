"""``python -m mlx_flashhead.server``: a shell over `commands/server.py`."""

from .commands.server import main

if __name__ == "__main__":
    main()
