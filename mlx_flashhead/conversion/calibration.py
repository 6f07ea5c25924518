"""Hidden states at the head's input, of text that a model writes or reads.

Reading takes one pass. Writing takes a pass for every token of a batch, so a token takes several
times as long (docs/how-it-works.md).
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..lossless.sampler import make_sampler
from ..models.batches import batch_generator
from ..models.cpu_products import numpy_products
from ..models.libraries import forward
from ..models.locate import HeadLocation, recorded_hidden

SEQUENCE_TOKENS = 64
BATCH_SIZE = 32
WINDOW_TOKENS = 512  # of one given text; each window starts afresh
READ_TOKENS = 2048  # of windows that are read together
LEAST_LENGTH = 2 / 3  # of a window, relative to the longest of those that are read together


def generated_states(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    prompts: Iterator[list[int]],
    positions: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    seconds: float = float("inf"),
    description: str = "Writing text",
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of text that the model writes itself, in batches.

    Args:
        model: A dense mlx-lm model.
        tokenizer: Its tokenizer.
        location: Its head.
        prompts: Token ids to continue, without end.
        positions: Greatest number of states.
        seed: Seed of the sampling.
        temperature: Of the sampling; 0 is greedy.
        seconds: Time limit. After it no further states are computed.
        description: Text of the bar.
        progress: Show a bar.

    Returns:
        States (N, D) float32 in the order of generation, and the tokens drawn from them (N,) int64.
        N is at most ``positions``.
    """
    mx.random.seed(seed)
    draw = make_sampler(temp=temperature)
    steps: list[tuple[mx.array, mx.array]] = []
    states: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    count, deadline = 0, time.monotonic() + seconds
    with (
        numpy_products(),
        recorded_hidden(location) as recorded,
        tqdm(total=positions, desc=description, unit="token", disable=not progress) as bar,
    ):

        def sampler(logprobs):
            # prompts are padded to one length, so only the last state of each is a real one
            tokens = draw(logprobs)
            steps.append((recorded[-1][:, -1].astype(mx.float32), tokens))
            recorded.clear()
            return tokens

        ends = [[token] for token in tokenizer.eos_token_ids]
        generator = batch_generator(model, ends, sampler, BATCH_SIZE)
        missing = min(BATCH_SIZE, -(-positions // SEQUENCE_TOKENS))
        while count < positions and time.monotonic() < deadline:
            if missing:
                # by length, since prompts read together are padded to the longest
                fresh = sorted((next(prompts) for _ in range(missing)), key=len)
                generator.insert(fresh, [SEQUENCE_TOKENS] * missing)
            responses = generator.next_generated()
            missing = sum(response.finish_reason is not None for response in responses)
            for hidden, tokens in steps:
                states.append(np.array(hidden))
                drawn.append(np.array(tokens, dtype=np.int64))
                bar.update(min(len(hidden), positions - count))
                count += len(hidden)
            steps.clear()
        generator.close()
    if not states:  # the time limit came before the first step
        return np.empty((0, location.rows().hidden_size), np.float32), np.empty(0, np.int64)
    return np.concatenate(states)[:positions], np.concatenate(drawn)[:positions]


def text_states(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    text: str,
    *,
    positions: int | None = None,
    description: str = "Reading",
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of a text, in windows of 512 tokens that each start afresh.

    If the tokenizer begins a text with a token of its own (BOS), each window begins with it.

    Args:
        model: A dense or FlashHead model.
        tokenizer: Its tokenizer.
        location: Its head.
        text: The text; special tokens in it, such as chat markup, are understood.
        positions: Greatest number of states; None: all.
        description: Text of the bar.
        progress: Show a bar.

    Returns:
        States (N, D) float32 and the true next tokens (N,) int64.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    token_ids = tokenizer.encode(text)
    if positions is not None:
        token_ids = token_ids[: positions + 1]
    if len(token_ids) < 2:
        raise ValueError("The text is too short to measure anything on: give one of some pages.")
    first, *further = windows_of(token_ids, WINDOW_TOKENS)
    # the first window begins with BOS already
    beginning = beginning_of_text(tokenizer)
    prefixes = [[], *([beginning] * len(further))]
    states = read_windows(
        model, location, [first, *further], prefixes, description=description, progress=progress
    )
    return np.concatenate(states), np.array(token_ids[1:], dtype=np.int64)


def beginning_of_text(tokenizer) -> list[int]:
    """The token with which the tokenizer begins each text, in a list; empty if there is none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer.encode("") else []


def windows_of(token_ids: Sequence[int], length: int) -> list[list[int]]:
    """Token ids (N,) cut into windows of ``length`` states.

    Each window ends with the token after its last state, and the next one begins with that token.
    """
    return [
        list(token_ids[start : start + length + 1])
        for start in range(0, len(token_ids) - 1, length)
    ]


def read_windows(
    model: nn.Module,
    location: HeadLocation,
    windows: Sequence[list[int]],
    prefixes: Sequence[list[int]],
    *,
    seconds: float = float("inf"),
    description: str = "Reading",
    progress: bool = True,
) -> list[np.ndarray]:
    """Hidden states of each window without its last token, several windows at once.

    Args:
        model: A dense or FlashHead model.
        location: Its head.
        windows: Token ids, at least two each.
        prefixes: Token ids before each window, whose states are left out.
        seconds: After which no further windows are read than the first ones.
        description: Text of the bar.
        progress: Show a bar.

    Returns:
        For each window of n tokens (n - 1, D) float32; (0, 0) for one that was not read.
    """
    states = [np.empty((0, 0), np.float32)] * len(windows)
    inputs = [[*prefix, *window[:-1]] for prefix, window in zip(prefixes, windows, strict=True)]
    total = sum(len(window) - 1 for window in windows)
    deadline = time.monotonic() + seconds
    with (
        numpy_products(lazy=location.module),
        recorded_hidden(location) as recorded,
        tqdm(total=total, desc=description, unit="token", disable=not progress) as bar,
    ):
        for batch in _batches([len(one) for one in inputs]):
            if any(map(len, states)) and time.monotonic() > deadline:
                break
            length = len(inputs[batch[0]])
            # shorter ones are padded at the end, where no state looks
            forward(model, mx.array([inputs[i] + [0] * (length - len(inputs[i])) for i in batch]))
            # only the states are evaluated, and the windows' logits are never computed
            read = np.array(recorded[-1].astype(mx.float32))
            recorded.clear()
            for i, one in zip(batch, read, strict=True):
                states[i] = one[len(prefixes[i]) : len(inputs[i])]
                bar.update(len(states[i]))
    return states


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of windows of like length to read together, the longest first, near their order."""
    waiting: list[int] = []
    for place in range(len(lengths)):
        waiting.append(place)
        if sum(lengths[i] for i in waiting) < READ_TOKENS and place < len(lengths) - 1:
            continue
        waiting.sort(key=lambda i: -lengths[i])
        while waiting:
            longest = lengths[waiting[0]]
            alike = [i for i in waiting if lengths[i] >= LEAST_LENGTH * longest]
            together = alike[: max(1, READ_TOKENS // longest)]
            yield together
            waiting = waiting[len(together) :]


def read_text(path: str | Path) -> str:
    """A calibration or evaluation text.

    Raises:
        ValueError: If the file cannot be read, is not UTF-8 text, or is empty.
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
