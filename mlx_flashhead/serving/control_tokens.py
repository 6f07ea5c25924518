"""Control tokens that stand in what users and tools write: cut, so that they are read as text.

A tokenizer turns a text such as ``<|im_start|>`` into a control token wherever it stands. A text
that is tokenized in two parts, of which each has a piece of it, has none.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from .api_errors import field_error

# Characters that Unicode reserves for programs, of which one marks the cuts.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_WRITTEN_BY_OTHERS = ("user", "tool", "function")  # roles, beside those of the operator


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: mlx-lm's wrapper, or transformers' tokenizer.
    """

    def __init__(self, tokenizer: Any):
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        # beside the special ones, marks of thoughts and of calls
        names = {token.content for token in added if token.special or token.content[:1] in "<["}
        self._names = {name for name in names if len(name) > 1}  # others cannot be cut
        self._lengths = sorted({len(name) for name in self._names})
        self._first_letters = {name[0] for name in self._names}

    def cuts(self, text: str) -> list[int]:
        """Places within a text, of which each control token has one after its first character."""
        return [
            start + 1
            for start, letter in enumerate(text)
            if letter in self._first_letters and self._begins(text, start)
        ]

    def _begins(self, text: str, start: int) -> bool:
        return any(text[start : start + length] in self._names for length in self._lengths)


def mark_control_tokens(
    messages: Iterable[dict[str, Any]], tokens: ControlTokens
) -> tuple[list[dict[str, Any]], str]:
    """Marks where the texts of users and tools are to be cut.

    Args:
        messages: Messages whose contents are texts.
        tokens: The control tokens of the model.

    Returns:
        The messages with a mark at each cut, and the mark, a character that is in no message.

    Raises:
        ApiError: If every such character is in the messages.
    """
    messages = list(messages)
    contents = "".join(message["content"] for message in messages)
    mark = next((mark for mark in _MARKS if mark not in contents), None)
    if mark is None:
        raise field_error(
            "messages",
            "hold all characters that Unicode reserves for programs, U+FDD0 to U+FDEF: leave one "
            "out.",
        )
    marked = []
    for message in messages:
        if message["role"] in _WRITTEN_BY_OTHERS:
            text = message["content"]
            places = [0, *tokens.cuts(text), len(text)]
            pieces = [text[a:b] for a, b in pairwise(places)]
            message = {**message, "content": mark.join(pieces)}
        marked.append(message)
    return marked, mark
