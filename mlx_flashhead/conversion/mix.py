"""The texts for calibration: given text of many kinds, and text that the model writes.

Self-written text alone is a narrow teacher and an easy judge (docs/how-it-works.md). The last
quarter of each kind is held out: it chooses the probes and makes the report.
"""

import mlx.nn as nn
import numpy as np

from ..models.locate import HeadLocation
from .calibration import beginning_of_text, generated_states, read_windows, windows_of
from .given_text import ASIAN, DIALOGUE, EUROPEAN, KINDS, dialogues, given_documents
from .positions import Positions
from .prompts import chat_prompts, varied_prompts
from .steps import Steps, Stopwatch, stepwise

ANSWERS, SELF_WRITTEN = "answers, greedy", "self-written"
MIX_WINDOW = 256  # positions; longer windows take more time and gain little
# Each human language has clusters of its own, so there are more and shorter windows of them.
LANGUAGES_WINDOW = 64
SHARES = {kind: 2 if kind in (EUROPEAN, ASIAN) else 1 for kind in KINDS}  # of the given text
WRITTEN_SHARE = 1 / 6  # of the positions, since written text costs more time and teaches less
READING_SHARE = 1 / 2  # of the time, for given text; a slow machine would leave none for writing
HELD_OUT_SHARE = 1 / 4  # of each kind
LEAST_WINDOW = 8  # tokens; shorter rests are left out


class GivenText:
    """Given text in windows, of each kind its share of ``positions`` at most.

    The kinds take turns, so that a time limit shortens all of them.
    """

    def __init__(self, model: nn.Module, tokenizer, location: HeadLocation, positions: int):
        self._model, self._location = model, location
        token_ids = {
            kind: [list(tokenizer.encode(document)) for document in documents]
            for kind, documents in given_documents().items()
        }
        token_ids[DIALOGUE] = [_dialogue(tokenizer, messages) for messages in dialogues()]
        self._beginning = beginning_of_text(tokenizer)
        self._names = tuple(token_ids)
        ends = np.cumsum([0, *(SHARES[name] for name in self._names)])
        wanted_of = np.diff(np.rint(positions * ends / ends[-1])).astype(int).tolist()
        placed = []
        for kind, (name, wanted) in enumerate(zip(self._names, wanted_of, strict=True)):
            length = MIX_WINDOW if SHARES[name] == 1 else LANGUAGES_WINDOW
            before = 0
            for window in _chosen_windows(token_ids[name], self._beginning, wanted, length):
                placed.append((before / wanted, kind, window))
                before += len(window) - 1
        placed.sort(key=lambda one: one[:2])
        self._kinds = [kind for _, kind, _ in placed]
        self._windows = [window for *_, window in placed]
        self._states: list[np.ndarray | None] = [None] * len(placed)

    def read(
        self, limit: Stopwatch, until: float = 0.0, *, step_seconds: float = float("inf")
    ) -> Steps[None]:
        """Reads windows that are not read yet until the time is up, a few at least.

        Args:
            limit: Time limit.
            until: Seconds of it that are left to others.
            step_seconds: As in `read_windows`.
        """
        places = [i for i, states in enumerate(self._states) if states is None]
        if not places:
            return
        found = yield from read_windows.steps(
            self._model,
            self._location,
            [self._windows[i] for i in places],
            [self._beginning] * len(places),
            limit=limit,
            until=until,
            stage="Reading given text",
            step_seconds=step_seconds,
        )
        for i, states in zip(places, found, strict=True):
            if len(states):
                self._states[i] = states

    def positions(self) -> Positions:
        """The states that are read."""
        parts = []
        for kind, name in enumerate(self._names):
            states, next_ids = [], []
            for of, window, read in zip(self._kinds, self._windows, self._states, strict=True):
                if of == kind and read is not None:
                    states.append(read)
                    next_ids.append(np.array(window[1:], dtype=np.int64))
            if states:
                parts.append(
                    Positions.of_one_kind(
                        name, np.concatenate(states), np.concatenate(next_ids), HELD_OUT_SHARE
                    )
                )
        return Positions.joined(parts)


def _dialogue(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True))
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return list(tokenizer.encode("\n\n".join(lines)))


def _chosen_windows(
    documents: list[list[int]], beginning: list[int], positions: int, length: int
) -> list[list[int]]:
    """Windows of ``length`` of all documents in a fixed random order, up to some positions.

    The first windows of all documents come before any second one.
    """
    rng = np.random.default_rng(0)
    placed = []
    for token_ids in documents:
        if beginning and token_ids[:1] == beginning:
            token_ids = token_ids[1:]
        for place, window in enumerate(windows_of(token_ids, length)):
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
    seed: int,
    limit: Stopwatch,
) -> Steps[list[Positions]]:
    """States of text that the model writes: half of them greedy answers, half sampled text.

    There are fewer positions if the time limit comes first. The answers have half of the time, and
    the sampled text what they leave.
    """
    rng = np.random.default_rng(seed)
    vocab_size = location.rows().n_rows
    parts = []
    answered = positions // 2
    requests, beginnings = chat_prompts(tokenizer, rng), varied_prompts(tokenizer, vocab_size, rng)
    for name, stage, prompts, temperature, wanted, until in (
        (ANSWERS, "Writing answers", requests, 0.0, answered, limit.left / 2),
        (SELF_WRITTEN, "Writing text", beginnings, 1.0, positions - answered, 0.0),
    ):
        states, next_ids = yield from generated_states.steps(
            model,
            tokenizer,
            location,
            prompts,
            wanted,
            seed=seed,
            temperature=temperature,
            limit=limit,
            until=until,
            stage=stage,
        )
        if len(states):
            parts.append(Positions.of_one_kind(name, states, next_ids, HELD_OUT_SHARE))
    return parts


@stepwise
def mixed_positions(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    positions: int,
    *,
    written_share: float = WRITTEN_SHARE,
    seed: int = 0,
    limit: Stopwatch | None = None,
    step_seconds: float = float("inf"),
) -> Steps[Positions]:
    """States of given text, and of text that the model writes.

    Reading has half of the time, writing has the rest, and what writing leaves goes to text that is
    not read yet.

    Args:
        model: A dense mlx-lm model.
        tokenizer: Its tokenizer.
        location: Its head.
        positions: Approximate number; fewer if the given text is shorter or the time limit comes.
        written_share: Share of the positions that the model writes.
        seed: Seed of the written text. The given text is always the same.
        limit: Time limit of reading and writing together.
        step_seconds: About the longest time of a step that reads.
    """
    limit = limit or Stopwatch()
    n_written = round(written_share * positions)
    given = GivenText(model, tokenizer, location, positions - n_written)
    until = (1 - READING_SHARE) * limit.left if n_written else 0.0
    yield from given.read(limit, until, step_seconds=step_seconds)
    written: list[Positions] = []
    if n_written:
        written = yield from written_positions(
            model, tokenizer, location, n_written, seed=seed, limit=limit
        )
    if limit.left > 0:
        yield from given.read(limit, step_seconds=step_seconds)
    return Positions.joined([given.positions(), *written])
