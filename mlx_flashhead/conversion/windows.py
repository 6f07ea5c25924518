"""The windows of text that a calibration reads: of one text, or of given text of many kinds."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from .given_text import ASIAN, DIALOGUE, EUROPEAN, KINDS, dialogues, given_documents

GIVEN_TOKENS = 64  # of a window of given text; longer windows take longer steps and gain nothing
CONTEXT = 8  # first tokens of such a window, whose states have seen too little and are left out
LEAST_TOKENS = 16  # of such a window; shorter rests are left out
SHARES = {kind: 2 if kind in (EUROPEAN, ASIAN) else 1 for kind in KINDS}  # of the given text


def beginning_of_text(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer begins each text, in a list; empty if there is none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer.encode("") else []


def windows_of(token_ids: Sequence[int], length: int) -> list[list[int]]:
    """Windows of ``length`` states. The token after a window's last state begins the next one."""
    return [
        list(token_ids[start : start + length + 1])
        for start in range(0, len(token_ids) - 1, length)
    ]


def given_windows(tokenizer: Any, positions: int) -> list[list[int]]:
    """Windows of given text without its beginning, of each kind its share of ``positions`` at most.

    The kinds take turns: a time limit shortens all of them, and the last windows are of all kinds.
    """
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
    return [window for _, window in sorted(placed, key=itemgetter(0))]


def _dialogue(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True))
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return list(tokenizer.encode("\n\n".join(lines)))


def _chosen_windows(
    documents: list[list[int]], beginning: list[int], positions: int
) -> list[list[int]]:
    """Windows of all documents in a fixed random order, up to some positions.

    The first windows of all documents come before any second one.
    """
    rng = np.random.default_rng(0)
    placed = []
    for token_ids in documents:
        if beginning and token_ids[:1] == beginning:
            token_ids = token_ids[1:]
        for place, window in enumerate(windows_of(token_ids, GIVEN_TOKENS)):
            placed.append((place, rng.random(), window))
    chosen = []
    for _, _, window in sorted(placed):
        if len(window) >= LEAST_TOKENS and positions > 0:
            chosen.append(window[: CONTEXT + positions + 1])
            positions -= len(chosen[-1]) - 1 - CONTEXT
    return chosen
