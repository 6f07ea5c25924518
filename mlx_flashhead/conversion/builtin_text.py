"""Given text to calibrate on, of many kinds, written for this project except the first sentences of
Caesar's De Bello Gallico; and Python's own modules and help topics, which `texts` name."""

import importlib.util
import re
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

PYTHON, DIALOGUE = "python", "dialogue"
# The kinds in their order, each with its parts of the whole; most are files of `texts`.
SHARES = {"prose": 1, "documentation": 1, "code": 1, "markup": 1, "european": 2, "asian": 2}
SHARES |= {PYTHON: 1, DIALOGUE: 1}

WINDOW_TOKENS = 64  # longer windows take longer steps and gain nothing
CONTEXT = 8  # first tokens of a window, whose states have seen too little and are left out
LEAST_TOKENS = 16  # of a window; shorter rests are left out

EXCERPT_CHARACTERS = 3000  # of a module's source, from 40 % on, or of a help topic


def given_documents() -> dict[str, list[str]]:
    """Documents by kind, always in the same order, but for dialogues; those that Python has
    here."""
    documents = {kind: _documents(kind) for kind in SHARES if kind not in (PYTHON, DIALOGUE)}
    with suppress(ImportError):
        from pydoc_data.topics import topics

        named = [topics[name] for name in _file("topics").split() if name in topics]
        documents["documentation"] += [text[:EXCERPT_CHARACTERS] for text in named]
    documents[PYTHON] = []
    for name in _file("modules").split():
        with suppress(ImportError, OSError, UnicodeDecodeError):
            spec = importlib.util.find_spec(name)
            source = Path(spec.origin or "").read_text(encoding="utf-8") if spec else ""
            start = source.find("\n", len(source) * 2 // 5) + 1
            if source:
                documents[PYTHON].append(source[start : start + EXCERPT_CHARACTERS])
    return documents


def dialogues() -> list[list[dict[str, str]]]:
    """Conversations as lists of messages with ``role`` and ``content``."""
    found = []
    for document in _documents(DIALOGUE):
        _, *parts = re.split(r"^(User|Assistant): ", document, flags=re.MULTILINE)
        messages = zip(parts[::2], parts[1::2], strict=True)
        found.append([{"role": who.lower(), "content": said.strip()} for who, said in messages])
    return found


def _documents(kind: str) -> list[str]:
    return _file(kind).split("%%%%\n")


def _file(name: str) -> str:
    return (resources.files(__package__) / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def beginning_of_text(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer begins each text, in a list; empty if there is none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer.encode("") else []


def windows_of(token_ids: list[int], length: int) -> list[list[int]]:
    """Windows of ``length`` states. The token after a window's last state begins the next one."""
    starts = range(0, len(token_ids) - 1, length)
    return [token_ids[start : start + length + 1] for start in starts]


def given_windows(tokenizer: Any, positions: int) -> list[list[int]]:
    """Windows of given text without its beginning, of each kind its share of ``positions`` at most.
    The kinds take turns, so that a time limit shortens all of them."""
    documents = given_documents()
    token_ids = {
        kind: [list(tokenizer.encode(one)) for one in documents[kind]] for kind in documents
    }
    token_ids[DIALOGUE] = [_dialogue(tokenizer, messages) for messages in dialogues()]
    beginning = beginning_of_text(tokenizer)
    ends = np.cumsum([0, *(SHARES[kind] for kind in token_ids)])
    wanted_of = np.diff(np.rint(positions * ends / ends[-1])).astype(int).tolist()
    placed: list[tuple[float, list[int]]] = []
    for of_kind, wanted in zip(token_ids.values(), wanted_of, strict=True):
        before = 0
        for window in _chosen_windows(of_kind, beginning, wanted):
            placed.append((before / wanted, window))
            before += len(window) - 1 - CONTEXT
    return [window for _, window in sorted(placed, key=lambda one: one[0])]


def _dialogue(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True))
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return list(tokenizer.encode("\n\n".join(lines)))


def _chosen_windows(
    documents: list[list[int]], beginning: list[int], positions: int
) -> list[list[int]]:
    """Windows in a fixed random order, up to some positions: the first of all documents first."""
    rng = np.random.default_rng(0)
    placed = []
    for token_ids in documents:
        if beginning and token_ids[:1] == beginning:
            token_ids = token_ids[1:]
        for place, window in enumerate(windows_of(token_ids, WINDOW_TOKENS)):
            placed.append((place, rng.random(), window))
    chosen = []
    for _, _, window in sorted(placed):
        if len(window) >= LEAST_TOKENS and positions > 0:
            chosen.append(window[: CONTEXT + positions + 1])
            positions -= len(chosen[-1]) - 1 - CONTEXT
    return chosen
