"""Hidden states at the head's input, of text that a model reads."""

import math
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.compat.mlx_lm import make_prompt_cache
from ..models.cpu_products import numpy_products
from ..models.libraries import forward, is_vlm
from ..models.locate import HeadLocation, recorded_hidden
from .builtin_text import CONTEXT, beginning_of_text, given_windows, windows_of
from .steps import Step, Steps

WINDOW_TOKENS = 512  # of one text; each window starts afresh
READ_TOKENS = 2048  # of windows that are read together
LEAST_TOKENS = 16  # of a step, however long it takes
WEIGHTS_TOKENS = 32  # a pass reads all weights, which takes about as long as so many tokens
LEAST_LENGTH = 2 / 3  # of a window, relative to the longest of those that are read together


def text_states(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    text: str,
    *,
    positions: int | None = None,
    step_seconds: float = math.inf,
) -> Steps[tuple[np.ndarray, np.ndarray]]:
    """At most ``positions`` hidden states (N, D) float32 of a text, and the next tokens (N,) int64.

    Each window starts afresh, as a text does. Special tokens, such as chat markup, are understood.
    ValueError if there are fewer than two tokens.
    """
    token_ids = list(tokenizer.encode(text))
    if positions is not None:
        token_ids = token_ids[: positions + 1]
    if len(token_ids) < 2:
        raise ValueError("The text is too short to measure anything on: give one of some pages.")
    first, *others = windows_of(token_ids, WINDOW_TOKENS)
    beginning = beginning_of_text(tokenizer)  # the first window has it already
    windows = [first, *(beginning + window for window in others)]
    read = yield from read_windows(model, location, windows, step_seconds=step_seconds)
    states = [read[0], *(of_window[len(beginning) :] for of_window in read[1:])]
    return np.concatenate(states), np.array(token_ids[1:], dtype=np.int64)


def given_states(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    positions: int,
    *,
    seconds: float = math.inf,
    step_seconds: float = math.inf,
) -> Steps[tuple[np.ndarray, np.ndarray, bool]]:
    """As `text_states` of given text of many kinds: as much as ``seconds`` of the model's work
    allow, and whether these cut it short."""
    beginning = beginning_of_text(tokenizer)
    windows = given_windows(tokenizer, positions)
    read = yield from read_windows(
        model,
        location,
        [beginning + window for window in windows],
        seconds=seconds,
        stage="Reading given text",
        step_seconds=step_seconds,
    )
    done = [(s, window) for s, window in zip(read, windows, strict=True) if len(s)]
    states = [of_window[len(beginning) + CONTEXT :] for of_window, _ in done]
    next_ids = [token for _, window in done for token in window[CONTEXT + 1 :]]
    return np.concatenate(states), np.array(next_ids, dtype=np.int64), len(done) < len(windows)


def read_windows(
    model: nn.Module,
    location: HeadLocation,
    windows: Sequence[list[int]],
    *,
    seconds: float = math.inf,
    stage: str = "Reading",
    step_seconds: float = math.inf,
) -> Steps[list[np.ndarray]]:
    """Hidden states (n - 1, D) float32 of each window of n tokens, several windows at once.

    After ``seconds`` of the model's work no more are read, which leaves (0, 0) for them. A step
    takes about ``step_seconds``: less than a window if need be, but for models of mlx-vlm.
    """
    states = [np.empty((0, 0), np.float32)] * len(windows)
    inputs = [window[:-1] for window in windows]
    total, read, spent = sum(map(len, inputs)), 0, 0.0
    together: float = READ_TOKENS if step_seconds == math.inf else LEAST_TOKENS
    waiting = list(range(len(windows)))
    while waiting and (not read or spent < seconds):
        batch = _next_together(waiting, inputs, together)
        length = len(inputs[batch[0]])
        # shorter ones are padded at the end, where no state looks
        tokens = mx.array([inputs[i] + [0] * (length - len(inputs[i])) for i in batch])
        n_parts = 1 if is_vlm(model) else math.ceil(tokens.size / together)
        cache = make_prompt_cache(model) if n_parts > 1 else None
        parts: list[np.ndarray] = []
        size = math.ceil(length / n_parts)
        for start in range(0, length, size):
            part = slice(start, start + size)
            began = monotonic()
            with numpy_products(location.module), recorded_hidden(location) as recorded:
                forward(model, tokens[:, part], cache)
                # only the states are evaluated, and the windows' logits are never computed
                parts.append(np.array(recorded[-1].astype(mx.float32)))
            took = max(monotonic() - began, 1e-6)
            spent += took
            fitting = (tokens[:, part].size + WEIGHTS_TOKENS) * step_seconds / took - WEIGHTS_TOKENS
            together = min(READ_TOKENS, max(LEAST_TOKENS, fitting))
            read += sum(len(inputs[i][part]) for i in batch)
            yield Step(stage, read, total, "token")
        for i, of_window in zip(batch, np.concatenate(parts, axis=1), strict=True):
            states[i] = of_window[: len(inputs[i])]
    return states


def _next_together(waiting: list[int], inputs: Sequence[Sequence[int]], tokens: float) -> list[int]:
    """Takes from ``waiting`` windows of like length to read together, near their order, the longest
    first: as many as hold about ``tokens``, at least one."""
    total, near = 0, 0
    while near < len(waiting) and total < tokens:
        total += len(inputs[waiting[near]])
        near += 1
    listed = sorted(waiting[:near], key=lambda i: -len(inputs[i]))
    longest = len(inputs[listed[0]])
    alike = [i for i in listed if len(inputs[i]) >= LEAST_LENGTH * longest]
    batch = alike[: max(1, int(tokens // longest))]
    waiting[:] = [i for i in waiting if i not in batch]
    return batch


def read_text(path: str | Path) -> str:
    """A calibration or evaluation text; a ValueError if it is no UTF-8 text, or empty."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: give a plain text file.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: give a text of some pages.")
    return text
