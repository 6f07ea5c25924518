"""A whole model: decode speed through mlx-lm's own generation, dense, FlashHead and without a head.

The model without a head gives stored logits. It shows how much a head that costs nothing saves.
FlashHead's saving is reported as a share of that. The FlashHead model uses this package's samplers,
the other two use mlx-lm's.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..common.timing import Spread, in_turns, turns
from ..lossless.sampler import make_sampler
from ..models.compat.generate import BatchGenerator, generate_step
from ..models.locate import find_head, recorded_hidden

DENSE, FLASH_HEAD, NO_HEAD = "dense", "FlashHead", "no head"
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temp": 0.0},
    "top-p": {"temp": 0.8, "top_p": 0.95},
}
PROMPT = (
    "The old bridge over the river had been closed for years, and nobody in the village could say "
    "who had built it. One morning in spring, a stranger came and"
)
PROMPT_IDS = list(range(1, 17))  # tokens of any vocabulary


@contextmanager
def without_head(model: nn.Module) -> Iterator[None]:
    """Within the block, a dense model's head waits for its hidden state and gives stored logits.

    Each step gives the logits of another token of ``PROMPT_IDS``, since a processor sorts values
    that it has just sorted in half of the time.
    """
    location = find_head(model)
    module, base = location.module, type(location.module)
    with recorded_hidden(location) as states:
        model(mx.array([PROMPT_IDS]))
    rows = getattr(module, location.method)(states[-1])  # (1, L, V)
    mx.eval(rows)
    stored: dict[tuple[int, ...], mx.array] = {}
    turns = itertools.cycle(range(len(PROMPT_IDS)))

    def free(self, hidden):
        *shape, length, _ = hidden.shape
        turn = next(turns) if length == 1 else 0
        key = (*shape, length, turn)
        if key not in stored:
            row = mx.broadcast_to(rows[:, turn, None], (*shape, length, rows.shape[-1]))
            stored[key] = mx.contiguous(row)
            mx.eval(stored[key])
        return mx.depends([stored[key]], [hidden])[0]

    module.__class__ = type(base.__name__, (base,), {location.method: free})
    try:
        yield
    finally:
        module.__class__ = base


def decode_seconds(
    model: nn.Module, prompt: list[int], batch: int, tokens: int, sampler: Callable
) -> float:
    """Seconds of one decode step of a batch: the median of ``tokens`` steps after the first."""
    times = []
    if batch == 1:
        steps = generate_step(mx.array(prompt), model, max_tokens=tokens + 1, sampler=sampler)
        for _ in steps:
            times.append(time.perf_counter())
    else:
        generator = BatchGenerator(model, sampler=sampler)
        generator.insert([prompt] * batch, [tokens + 1] * batch)
        while generator.next_generated():
            times.append(time.perf_counter())
        generator.close()
    return float(np.median(np.diff(times)))


def sampling_seconds(
    model: nn.Module, prompt: list[int], batch: int, sampler: Callable, rounds: int
) -> list[float]:
    """Seconds of normalising and sampling in mlx-lm's way, on logits of the model."""
    logits = model(mx.array([prompt]))[0]  # (L, V): each round takes another row
    stored = [mx.contiguous(mx.repeat(row[None], batch, axis=0)) for row in logits]
    mx.eval(stored)

    def sample(i):
        row = stored[i % len(stored)]
        return sampler(row - mx.logsumexp(row, axis=-1, keepdims=True))

    return in_turns({"sampling": sample}, rounds, progress=False)["sampling"]


def model_benchmark(
    dense: nn.Module,
    flash: nn.Module,
    tokenizer,
    *,
    samplers: Sequence[str] = tuple(SAMPLERS),
    batches: Sequence[int] = (1, 4, 8),
    tokens: int = 20,
    rounds: int = 12,
    progress: bool = True,
) -> list[dict]:
    """Times decoding for each sampler and batch, the three models in turns.

    Runs are short, so that other work on the machine slows all three alike. Ratios are computed
    within a round. Their median is reported.

    Args:
        dense: The dense model.
        flash: The same with a FlashHead.
        tokenizer: Their tokenizer.
        samplers: Names of ``SAMPLERS``.
        batches: Numbers of sequences at once.
        tokens: Steps of one run.
        rounds: Runs that count.
        progress: Show a bar.

    Returns:
        One entry for each sampler and batch, JSON-ready: tokens/s of all sequences together,
        milliseconds of a step split into body, head and sampling, and the saving as a share of the
        saving of a head that costs nothing: (t_dense - t_flash)/(t_dense - t_no_head). Faster
        sampling counts, so the share can be above 1.
    """
    prompt = tokenizer.encode(PROMPT)
    models: tuple[tuple[str, nn.Module, Callable[[], AbstractContextManager]], ...] = (
        (DENSE, dense, nullcontext),
        (FLASH_HEAD, flash, nullcontext),
        (NO_HEAD, dense, lambda: without_head(dense)),
    )
    total = len(samplers) * len(batches) * (rounds + 1) * len(models)
    results = []
    with tqdm(
        total=total, desc="Timing the model", unit="run", leave=False, disable=not progress
    ) as bar:
        for name in samplers:
            for batch in batches:
                steps: dict[str, list[float]] = {title: [] for title, *_ in models}
                for number, (title, model, context) in turns(models, rounds):
                    sampler = make_sampler(**SAMPLERS[name], model=model)
                    with context():
                        seconds = decode_seconds(model, prompt, batch, tokens, sampler)
                    if number:  # the first warms up
                        steps[title].append(seconds)
                    bar.update()
                sampling = {
                    title: sampling_seconds(
                        model, prompt, batch, make_sampler(**SAMPLERS[name], model=model), rounds
                    )
                    for title, model, _ in models[:2]
                }
                results.append(_summary(name, batch, tokens, steps, sampling))
    return results


def _summary(
    sampler: str,
    batch: int,
    tokens: int,
    steps: dict[str, list[float]],
    sampling: dict[str, list[float]],
) -> dict:
    milliseconds = {title: Spread.of(taken).scaled(1000) for title, taken in steps.items()}
    dense, flash, free = (np.array(steps[title]) for title in (DENSE, FLASH_HEAD, NO_HEAD))
    saved = Spread.of((dense - flash) / (dense - free))
    step = {title: spread.median for title, spread in milliseconds.items()}
    sampling_ms = {title: Spread.of(taken).scaled(1000) for title, taken in sampling.items()}
    body = step[NO_HEAD] - sampling_ms[DENSE].median
    head = {title: step[title] - body - spread.median for title, spread in sampling_ms.items()}
    return {
        "sampler": sampler,
        "batch": batch,
        "tokens": tokens,
        "tokens_per_second": {
            title: Spread.of([batch / s for s in taken]).to_dict() for title, taken in steps.items()
        },
        "step_ms": {title: spread.to_dict() for title, spread in milliseconds.items()},
        "sampling_ms": {title: spread.to_dict() for title, spread in sampling_ms.items()},
        "split_ms": {
            title: {"body": body, "head": head[title], "sampling": spread.median}
            for title, spread in sampling_ms.items()
        },
        "times_faster": float(np.median(dense / flash)),
        "times_faster_with_a_free_head": float(np.median(dense / free)),
        "share_of_free_head_saved": saved.median,
        "share_of_free_head_saved_quartiles": [saved.lower, saved.upper],
    }
