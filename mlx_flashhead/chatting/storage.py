"""Files that a chat at the terminal keeps for its user from one start to the next."""

from pathlib import Path

from .messages import Message, read_conversation, write_conversation

FOLDER = "~/.config/mlx_flashhead/chat"


def history_file() -> Path:
    """The file in which the line editor keeps typed lines."""
    return Path(FOLDER, "history").expanduser()


def keep(messages: list[Message], model: str) -> None:
    """Keeps a conversation as the last one.

    Raises:
        OSError: If it cannot be written.
    """
    path = _last_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_conversation(path, messages, model, replace=True)


def last_conversation() -> list[Message]:
    """The messages of the last conversation.

    Raises:
        ValueError: If there is none, or its file is damaged.
        OSError: If it cannot be read.
    """
    path = _last_file()
    if not path.exists():
        raise ValueError("There is no conversation to --resume: none has been kept yet.")
    return read_conversation(path, remedy="start without --resume")


def _last_file() -> Path:
    return Path(FOLDER, "last.json").expanduser()
