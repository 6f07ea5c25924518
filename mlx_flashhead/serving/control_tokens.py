"""Control tokens that stand in what users and tools write: cut, so that they are read as text.

A tokenizer turns a text such as ``<|im_start|>`` into a control token wherever it stands. A text
that is tokenized in two parts, of which each has a piece of it, has none.
"""

import secrets
from typing import Any

# The roles that are not the operator's.
_WRITTEN_BY_OTHERS = ("user", "tool", "function")


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts of a tokenizer's control tokens: special ones, and marks of thoughts and calls."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {token.content for token in added if token.special or token.content[:1] in "<["}
    # A name of one character cannot be cut.
    return frozenset(name for name in names if len(name) > 1)


def mark_control_tokens(
    messages: list[dict[str, Any]], tokens: frozenset[str]
) -> tuple[list[dict[str, Any]], str]:
    """Marks where the texts of users and tools are to be cut.

    Args:
        messages: Messages whose contents are texts.
        tokens: The control tokens of the model.

    Returns:
        The messages with a mark at each cut, and the mark, a text that nobody can guess.
    """
    # Unicode reserves the first character for programs.
    mark = f"\ufdd0{secrets.token_hex(4)}"
    first_letters = {token[0] for token in tokens}
    lengths = {len(token) for token in tokens}

    def cut(text: str) -> str:
        """The text with a mark after the first character of each control token."""
        marked = []
        for start, letter in enumerate(text):
            marked.append(letter)
            if letter in first_letters and any(text[start : start + n] in tokens for n in lengths):
                marked.append(mark)
        return "".join(marked)

    marked = []
    for message in messages:
        if message["role"] in _WRITTEN_BY_OTHERS:
            message = {**message, "content": cut(message["content"])}
        marked.append(message)
    return marked, mark
