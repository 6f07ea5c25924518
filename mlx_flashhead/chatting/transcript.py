"""The transcript of a conversation: its messages, and their file of JSON."""

import json
from pathlib import Path
from typing import TypedDict

from ..common.new_folder import new_file

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
KEY = "messages"


class Message(TypedDict):
    """One message in the form of chat templates."""

    role: str
    content: str


def _checked(messages: object) -> list[Message]:
    """The messages of a conversation that continues with a question, without other fields."""
    if not isinstance(messages, list):
        raise ValueError(f"a conversation is a list of messages under the key {KEY!r}")
    checked = []
    for number, message in enumerate(messages, 1):
        match message:
            case {"role": str(role), "content": str(content)}:
                checked.append(Message(role=role, content=content))
            case _:
                raise ValueError(f"message {number} must have a role and a content, both of text")
    roles = [message["role"] for message in checked]
    turns = roles[1:] if roles[:1] == [SYSTEM] else roles
    if turns != [USER, ASSISTANT] * (len(turns) // 2):
        raise ValueError("its messages are not questions of a user and answers of an assistant")
    return checked


def read_conversation(
    path: Path, *, remedy: str = "choose a file written by /save"
) -> list[Message]:
    """Reads the messages of a file in the form of ``write_conversation``.

    Raises:
        ValueError: If it does not hold a conversation, with the ``remedy``.
    """
    try:
        content = json.loads(path.read_bytes())
        return _checked(content.get(KEY) if isinstance(content, dict) else content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        reason = "it is not JSON"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{path} does not hold a conversation ({reason}): {remedy}.")


def write_conversation(
    path: Path, messages: list[Message], model: str, *, replace: bool = False
) -> None:
    """Writes the messages and the model's name as JSON, completely or not at all.

    Raises:
        ValueError: If the file exists and is not a conversation, unless ``replace`` is true.
        OSError: If it cannot be written.
    """
    if path.exists() and not replace:
        try:
            read_conversation(path)
        except ValueError:
            reason = f"{path} exists already and is not a conversation: choose another name."
            raise ValueError(reason) from None
    text = json.dumps({"model": model, KEY: messages}, indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def kept_file(name: str) -> Path:
    """A file that a chat at the terminal keeps for its user from one start to the next."""
    return Path("~/.config/mlx_flashhead/chat", name).expanduser()


def keep(messages: list[Message], model: str) -> None:
    """Keeps a conversation as the last one."""
    path = kept_file("last.json")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_conversation(path, messages, model, replace=True)


def last_conversation() -> list[Message]:
    """The messages of the last conversation; a ValueError if there is none."""
    path = kept_file("last.json")
    if not path.exists():
        raise ValueError("There is no conversation to --resume: none has been kept yet.")
    return read_conversation(path, remedy="start without --resume")
