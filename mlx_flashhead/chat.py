"""``python -m mlx_flashhead.chat``: a shell over `commands/chat.py`."""

from .commands.chat import main

if __name__ == "__main__":
    main()
