"""Windows of the tokens of a text."""

from typing import Any


def windows_of(token_ids: list[int], length: int) -> list[list[int]]:
    """Cuts a text into windows.

    The token after a window's last state begins the next window.

    Args:
        token_ids: The tokens of the text.
        length: States of a window, which has one token more.
    """
    starts = range(0, len(token_ids) - 1, length)
    return [token_ids[start : start + length + 1] for start in starts]


def beginning_of_text(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer begins each text, in a list; empty if there is none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer.encode("") else []
