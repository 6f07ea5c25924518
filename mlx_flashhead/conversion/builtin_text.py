"""The built-in text, of many genres, on which models are calibrated.

It was written for this project except the first sentences of Caesar's De Bello Gallico, and
Python's own modules and help topics. The files of `texts` name these modules and topics.
"""

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

PYTHON = "python"
DIALOGUE = "dialogue"
# The genres in their order, each with its parts of the whole; most are files of `texts`.
SHARES = {
    "prose": 1,
    "documentation": 1,
    "code": 1,
    "markup": 1,
    "european": 2,
    "asian": 2,
    PYTHON: 1,
    DIALOGUE: 1,
}
# An excerpt of a help topic or of a module's source has so many characters. That of a source
# begins after this share of it.
EXCERPT_CHARACTERS = 3000
EXCERPT_START = 2 / 5

# Longer windows of built-in text than of so many tokens take longer and gain nothing.
BUILTIN_WINDOW = 64
# The states of a window's first tokens have seen too little, and are left out.
CONTEXT = 8
# Shorter rests of a text than of so many tokens are left out.
MIN_WINDOW = 16


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
    if bos is None or bos not in tokenizer.encode(""):
        return []
    return [bos]


def read_parts(name: str) -> list[str]:
    """The parts of a file of `texts`."""
    file = resources.files(__package__) / "texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").split("%%%%\n")


def builtin_documents() -> dict[str, list[str]]:
    """Documents by genre, but for dialogues, in a fixed order.

    Modules and help topics that this Python lacks are left out.
    """
    documents = {genre: read_parts(genre) for genre in SHARES if genre not in (PYTHON, DIALOGUE)}
    for name in read_parts("topics")[0].split():
        if name in topics:
            documents["documentation"].append(topics[name][:EXCERPT_CHARACTERS])
    documents[PYTHON] = []
    for name in read_parts("modules")[0].split():
        file = Path(os.__file__).parent / f"{name.replace('.', '/')}.py"
        if file.exists():
            source = file.read_text(encoding="utf-8")
            start = source.find("\n", int(len(source) * EXCERPT_START)) + 1
            documents[PYTHON].append(source[start : start + EXCERPT_CHARACTERS])
    return documents


def dialogues() -> list[list[dict[str, str]]]:
    """Conversations as lists of messages with ``role`` and ``content``."""
    conversations = []
    for document in read_parts(DIALOGUE):
        _, *parts = re.split(r"^(User|Assistant): ", document, flags=re.MULTILINE)
        messages = []
        for who, text in zip(parts[::2], parts[1::2], strict=True):
            messages.append({"role": who.lower(), "content": text.strip()})
        conversations.append(messages)
    return conversations


def builtin_windows(tokenizer: Any, positions: int) -> list[list[int]]:
    """Windows of built-in text, without the token that begins a text.

    Each genre has its share. The genres take turns, so that a time limit shortens all of them.

    Args:
        tokenizer: The model's tokenizer.
        positions: The most states of all windows together.
    """
    documents: dict[str, list[list[int]]] = {}
    for genre, contents in builtin_documents().items():
        documents[genre] = [list(tokenizer.encode(content)) for content in contents]
    if tokenizer.has_chat_template:
        chats = [tokenizer.apply_chat_template(chat, tokenize=True) for chat in dialogues()]
    else:
        chats = [tokenizer.encode(text.strip()) for text in read_parts(DIALOGUE)]
    documents[DIALOGUE] = [list(chat) for chat in chats]
    beginning = beginning_of_text(tokenizer)
    ends = np.cumsum([0, *(SHARES[genre] for genre in documents)])
    sizes = np.diff(np.rint(positions * ends / ends[-1])).astype(int).tolist()
    # A window's turn comes at the share of its genre that is there before it.
    turns: list[tuple[float, list[int]]] = []
    for texts, size in zip(documents.values(), sizes, strict=True):
        left = size
        for window in _mixed_windows(texts, beginning):
            if len(window) >= MIN_WINDOW and left > 0:
                chosen = window[: CONTEXT + left + 1]
                turns.append(((size - left) / size, chosen))
                left -= len(chosen) - 1 - CONTEXT
    turns.sort(key=lambda turn: turn[0])
    return [window for _, window in turns]


def _mixed_windows(texts: Sequence[list[int]], beginning: list[int]) -> list[list[int]]:
    """The windows of texts in a fixed random order, the first windows of all texts first."""
    rng = np.random.default_rng(0)
    ranked = []
    for token_ids in texts:
        if token_ids[:1] == beginning:
            token_ids = token_ids[len(beginning) :]
        for number, window in enumerate(windows_of(token_ids, BUILTIN_WINDOW)):
            ranked.append((number, rng.random(), window))
    ranked.sort()
    return [window for _, _, window in ranked]
