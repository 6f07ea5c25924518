"""What a user types or pastes: a line, or several lines between quotes."""

from dataclasses import dataclass

PROMPT = "> "
QUOTES = '"""'


@dataclass(frozen=True)
class UserInput:
    """A text that the user has typed or pasted.

    Attributes:
        text: Without the quotes around several lines.
        plain: One line without quotes, which may be a command.
    """

    text: str
    plain: bool


def is_open(text: str) -> bool:
    """Whether a text begins with three quotes and the closing three are missing."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 6 or not text.endswith(QUOTES))


def without_quotes(text: str) -> UserInput:
    """The text that stands in the quotes, or all of it if there are none."""
    text = text.strip("\n")
    if text.strip().startswith(QUOTES):
        return UserInput(text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip(), False)
    return UserInput(text, "\n" not in text)
