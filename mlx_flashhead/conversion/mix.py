"""The mix of texts for calibration: text that the model writes, and given text of many kinds.

Self-written text alone is a narrow teacher and an easy judge (docs/how-it-works.md). The last
quarter of each kind is held out: it chooses the probes and makes the report.
"""

import time

import mlx.nn as nn
import numpy as np

from ..models.locate import HeadLocation
from .calibration import beginning_of_text, generated_states, read_windows, windows_of
from .given_text import DIALOGUE, KINDS, dialogues, given_documents
from .positions import Positions
from .prompts import chat_prompts, varied_prompts

ANSWERS, SELF_WRITTEN = "answers, greedy", "self-written"
MIX_WINDOW = 256  # positions; longer windows take more time and gain little
WRITTEN_SHARE = 1 / 6  # of the positions, since written text costs more time and teaches less
READING_SHARE = 2 / 3  # of the time
HELD_OUT_SHARE = 1 / 4  # of each kind
LEAST_WINDOW = 8  # tokens; shorter rests are left out


def given_positions(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    positions_per_kind: int,
    *,
    seconds: float = float("inf"),
    progress: bool = True,
) -> Positions:
    """States of the given text, at most ``positions_per_kind`` of each kind.

    The kinds take turns, so that a time limit shortens all of them.
    """
    token_ids = {
        kind: [list(tokenizer.encode(document)) for document in documents]
        for kind, documents in given_documents().items()
    }
    token_ids[DIALOGUE] = [_dialogue(tokenizer, messages) for messages in dialogues()]
    beginning = beginning_of_text(tokenizer)
    by_kind = [
        _chosen_windows(documents, beginning, positions_per_kind)
        for documents in token_ids.values()
    ]
    turns = [(turn, kind) for kind, chosen in enumerate(by_kind) for turn in range(len(chosen))]
    turns.sort()
    windows = [by_kind[kind][turn] for turn, kind in turns]
    states = read_windows(
        model,
        location,
        windows,
        [beginning] * len(windows),
        seconds=seconds,
        progress=progress,
    )
    parts = []
    for kind, name in enumerate(token_ids):
        read = [i for i, (_, of) in enumerate(turns) if of == kind and len(states[i])]
        if read:
            parts.append(
                Positions.of_one_kind(
                    name,
                    np.concatenate([states[i] for i in read]),
                    np.concatenate([np.array(windows[i][1:], dtype=np.int64) for i in read]),
                    HELD_OUT_SHARE,
                )
            )
    return Positions.joined(parts)


def _dialogue(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True))
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return list(tokenizer.encode("\n\n".join(lines)))


def _chosen_windows(
    documents: list[list[int]], beginning: list[int], positions: int
) -> list[list[int]]:
    """Windows of all documents in a fixed random order, up to a number of positions.

    The first windows of all documents come before any second one.
    """
    rng = np.random.default_rng(0)
    placed = []
    for token_ids in documents:
        if beginning and token_ids[:1] == beginning:
            token_ids = token_ids[1:]
        for place, window in enumerate(windows_of(token_ids, MIX_WINDOW)):
            placed.append((place, rng.random(), window))
    chosen = []
    for _, _, window in sorted(placed):
        if len(window) >= LEAST_WINDOW and positions > 0:
            chosen.append(window[: positions + 1])
            positions -= len(chosen[-1]) - 1
    return chosen


def written_positions(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    positions: int,
    *,
    seed: int = 0,
    seconds: float = float("inf"),
    progress: bool = True,
) -> list[Positions]:
    """States of text that the model writes: half of them greedy answers, half sampled text.

    There are fewer positions if the time limit comes first.
    """
    rng = np.random.default_rng(seed)
    vocab_size = location.rows().n_rows
    parts = []
    for name, prompts, temperature in (
        (ANSWERS, chat_prompts(tokenizer, rng), 0.0),
        (SELF_WRITTEN, varied_prompts(tokenizer, vocab_size, rng), 1.0),
    ):
        states, next_ids = generated_states(
            model,
            tokenizer,
            location,
            prompts,
            positions // 2,
            seed=seed,
            temperature=temperature,
            seconds=seconds / 2,
            progress=progress,
        )
        if len(states):
            parts.append(Positions.of_one_kind(name, states, next_ids, HELD_OUT_SHARE))
    return parts


def mixed_positions(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    positions: int,
    *,
    seed: int = 0,
    seconds: float = float("inf"),
    progress: bool = True,
) -> Positions:
    """States of the mix: of text that the model writes, and of given text.

    Args:
        model: A dense mlx-lm model.
        tokenizer: Its tokenizer.
        location: Its head.
        positions: Approximate number; fewer if the given text is shorter or the time limit comes.
        seed: Seed of the written text. The given text is always the same.
        seconds: Time limit of reading and writing together.
        progress: Show bars.
    """
    n_written = round(WRITTEN_SHARE * positions)
    per_kind = -(-(positions - n_written) // len(KINDS))
    until = time.monotonic() + seconds
    given = given_positions(
        model, tokenizer, location, per_kind, seconds=READING_SHARE * seconds, progress=progress
    )
    written = written_positions(
        model,
        tokenizer,
        location,
        n_written,
        seed=seed,
        seconds=until - time.monotonic(),
        progress=progress,
    )
    return Positions.joined([given, *written])
