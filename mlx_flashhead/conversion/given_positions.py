"""Positions of given text of many kinds, the usual text to calibrate on."""

import math
from typing import Any

import mlx.nn as nn
import numpy as np

from ..models.locate import HeadLocation
from .calibration import beginning_of_text, read_windows, windows_of
from .given_text import ASIAN, DIALOGUE, EUROPEAN, KINDS, dialogues, given_documents
from .positions import Positions
from .steps import Steps, Stopwatch, stepwise

WINDOW = 64  # tokens; longer windows take longer steps and gain nothing
CONTEXT = 8  # first tokens of a window, whose states have seen too little and are left out
SHARES = {kind: 2 if kind in (EUROPEAN, ASIAN) else 1 for kind in KINDS}  # of the given text
LEAST_WINDOW = 16  # tokens; shorter rests are left out


@stepwise
def given_positions(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    positions: int,
    *,
    limit: Stopwatch | None = None,
    step_seconds: float = math.inf,
) -> Steps[Positions]:
    """States of given text of many kinds, of each its share. It is always the same text.

    The kinds take turns, so that a time limit shortens all of them.

    Args:
        positions: Greatest number; fewer if the text is shorter or the time limit comes.
        limit: Time limit of the reading.
        step_seconds: About the longest time of a step.
    """
    beginning = beginning_of_text(tokenizer)
    documents = given_documents()
    token_ids = {
        kind: [list(tokenizer.encode(one)) for one in documents[kind]] for kind in documents
    }
    token_ids[DIALOGUE] = [_dialogue(tokenizer, messages) for messages in dialogues()]
    ends = np.cumsum([0, *(SHARES[kind] for kind in token_ids)])
    wanted_of = np.diff(np.rint(positions * ends / ends[-1])).astype(int).tolist()
    placed: list[tuple[float, str, list[int]]] = []
    for kind, wanted in zip(token_ids, wanted_of, strict=True):
        before = 0
        for window in _chosen_windows(token_ids[kind], beginning, wanted):
            placed.append((before / wanted, kind, window))
            before += len(window) - 1 - CONTEXT
    placed.sort(key=lambda one: one[0])
    read = yield from read_windows.steps(
        model,
        location,
        [beginning + window for *_, window in placed],
        limit=limit,
        stage="Reading given text",
        step_seconds=step_seconds,
    )
    states: dict[str, list[np.ndarray]] = {kind: [] for kind in token_ids}
    next_ids: dict[str, list[int]] = {kind: [] for kind in token_ids}
    for (_, kind, window), of_window in zip(placed, read, strict=True):
        if len(of_window):
            states[kind].append(of_window[len(beginning) + CONTEXT :])
            next_ids[kind] += window[CONTEXT + 1 :]
    return Positions.joined(
        [
            Positions.of_one_kind(kind, np.concatenate(states[kind]), np.array(next_ids[kind]))
            for kind in token_ids
            if states[kind]
        ]
    )


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
        for place, window in enumerate(windows_of(token_ids, WINDOW)):
            placed.append((place, rng.random(), window))
    chosen = []
    for _, _, window in sorted(placed):
        if len(window) >= LEAST_WINDOW and positions > 0:
            chosen.append(window[: CONTEXT + positions + 1])
            positions -= len(chosen[-1]) - 1 - CONTEXT
    return chosen
