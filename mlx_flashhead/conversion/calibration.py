"""Hidden states at the head's input to calibrate on.

They are states of built-in text, or of a user's text.
"""

import math
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.compat.mlx_lm import make_prompt_cache
from ..models.cpu_products import numpy_products
from ..models.locate import HeadLocation, recorded_hidden
from ..models.vlm import forward, is_vlm
from . import Progress, Task
from .builtin_text import CONTEXT, beginning_of_text, builtin_windows, windows_of
from .checkpoint import NOT_KEPT, Checkpoint

READING = "Reading built-in text"
# A window of a user's text has so many tokens, and starts afresh.
TEXT_WINDOW = 512
# So many tokens of windows are read together at most, and at least, however long they take.
READ_TOKENS = 2048
MIN_STEP = 16
# A pass reads all weights, which takes about as long as so many tokens.
WEIGHTS_TOKENS = 32


def text_states(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    text: str,
    *,
    positions: int | None = None,
    step_seconds: float = math.inf,
) -> Task[tuple[np.ndarray, np.ndarray]]:
    """Reads hidden states of a text.

    Each window starts afresh, as a text does. Special tokens, such as chat markup, are understood.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        location: Its head.
        text: The text.
        positions: The most states to read (default: all).
        step_seconds: About how long the model works at once.

    Returns:
        Hidden states (N, D) float32, and the tokens after them (N,) int64.

    Raises:
        ValueError: If there are fewer than two tokens.
    """
    token_ids = list(tokenizer.encode(text))
    if positions is not None:
        token_ids = token_ids[: positions + 1]
    if len(token_ids) < 2:
        raise ValueError("The text is too short to measure anything on: give one of some pages.")
    windows = windows_of(token_ids, TEXT_WINDOW)
    # The first window has the beginning of a text already.
    beginning = beginning_of_text(tokenizer)
    for i in range(1, len(windows)):
        windows[i] = beginning + windows[i]
    states = yield from read_windows(model, location, windows, step_seconds=step_seconds)
    for i in range(1, len(windows)):
        states[i] = states[i][len(beginning) :]
    return np.concatenate(states), np.array(token_ids[1:], dtype=np.int64)


def builtin_states(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    positions: int,
    seconds: float = math.inf,
    step_seconds: float = math.inf,
    checkpoint: Checkpoint = NOT_KEPT,
) -> Task[tuple[np.ndarray, np.ndarray, bool]]:
    """Reads hidden states of built-in text of many kinds.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        location: Its head.
        positions: The most states to read.
        seconds: The time limit of the model's work.
        step_seconds: About how long the model works at once.
        checkpoint: Keeps the states.

    Returns:
        Hidden states (N, D) float32, the tokens after them (N,) int64, and whether the time limit
        cut the text short.
    """
    beginning = beginning_of_text(tokenizer)
    windows = builtin_windows(tokenizer, positions)
    read = yield from read_windows(
        model,
        location,
        [beginning + window for window in windows],
        READING,
        seconds=seconds,
        step_seconds=step_seconds,
        checkpoint=checkpoint,
    )
    states = []
    next_ids = []
    for window_states, window in zip(read, windows, strict=True):
        if len(window_states):
            states.append(window_states[len(beginning) + CONTEXT :])
            next_ids.append(np.array(window[CONTEXT + 1 :], dtype=np.int64))
    is_cut_short = len(states) < len(windows)
    return np.concatenate(states), np.concatenate(next_ids), is_cut_short


def read_windows(
    model: nn.Module,
    location: HeadLocation,
    windows: Sequence[list[int]],
    stage: str = "Reading",
    *,
    seconds: float = math.inf,
    step_seconds: float = math.inf,
    checkpoint: Checkpoint = NOT_KEPT,
) -> Task[list[np.ndarray]]:
    """Reads the hidden states of windows, several windows at once.

    Args:
        model: The model.
        location: Its head.
        windows: Windows of n tokens each.
        stage: The name of this work.
        seconds: The time of the model's work after which no more windows are read.
        step_seconds: About how long the model works at once: less than a window if need be, but
            for models of mlx-vlm.
        checkpoint: Keeps the states.

    Returns:
        For each window its states (n - 1, D) float32, or (0, 0) if it was not read.
    """
    states = [np.empty((0, 0), np.float32) for _ in windows]
    inputs = [window[:-1] for window in windows]
    total = sum(len(tokens) for tokens in inputs)
    waiting = list(range(len(windows)))
    text = zlib.crc32(repr(inputs).encode())
    kept = checkpoint.read("states", text)
    spent = float(kept.get("spent", 0.0))
    n_kept = len(kept.get("states", ()))
    if n_kept:
        starts = np.cumsum([0, *map(len, inputs)])
        waiting = [i for i in waiting if starts[i + 1] > n_kept]
        for i in range(len(windows) - len(waiting)):
            states[i] = kept["states"][starts[i] : starts[i + 1]]
    # A bar is there before the first part, which may take long.
    yield Progress(stage, n_kept, total, kept=True)
    n_together: float = MIN_STEP
    if step_seconds == math.inf:
        n_together = READ_TOKENS
    longest = max(map(len, inputs), default=1)
    while waiting and (not spent or spent < seconds):
        n_windows = max(1, int(n_together // longest))
        batch = waiting[:n_windows]
        waiting = waiting[n_windows:]
        length = max(len(inputs[i]) for i in batch)
        # Shorter ones are padded at the end, where no state looks.
        tokens = mx.array([inputs[i] + [0] * (length - len(inputs[i])) for i in batch])
        n_parts = math.ceil(tokens.size / n_together)
        cache = None
        if is_vlm(model):
            n_parts = 1
        elif n_parts > 1:
            cache = make_prompt_cache(model)
        size = math.ceil(length / n_parts)
        parts = []
        for start in range(0, length, size):
            part = slice(start, start + size)
            began = monotonic()
            with numpy_products(model, location.module), recorded_hidden(location) as recorded:
                forward(model, tokens[:, part], cache)
                # Only the states are evaluated, and the windows' logits are never computed.
                parts.append(np.array(recorded[-1].astype(mx.float32)))
            took = max(monotonic() - began, 1e-6)
            spent += took
            fitting = (tokens[:, part].size + WEIGHTS_TOKENS) * step_seconds / took - WEIGHTS_TOKENS
            n_together = min(READ_TOKENS, max(MIN_STEP, fitting))
            yield Progress(stage, sum(len(inputs[i][part]) for i in batch), total)
        for i, window_states in zip(batch, np.concatenate(parts, axis=1), strict=True):
            states[i] = window_states[: len(inputs[i])]
        n_read = len(windows) - len(waiting)
        checkpoint.offer("states", text, partial(_kept_states, states[:n_read], spent))
    return states


def _kept_states(states: list[np.ndarray], spent: float) -> dict[str, np.ndarray]:
    """What is kept of the windows that were read, and the time that they took."""
    return {"states": np.concatenate(states), "spent": np.array(spent)}


def read_text(path: str | Path) -> str:
    """Reads a text to calibrate or to evaluate on.

    Args:
        path: A file.

    Raises:
        ValueError: If it is no UTF-8 text, or empty.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: give a plain text file.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: give a text of some pages.")
    return text
