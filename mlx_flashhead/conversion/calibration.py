"""Hidden states at the head's input to calibrate on: of built-in text, of a user's text, of a
drafter that answers requests.

The built-in text is of many kinds. It was written for this project except the first sentences of
Caesar's De Bello Gallico; and Python's own modules and help topics, which `texts` name.
"""

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from time import monotonic
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.matrix import as_float32
from ..models.compat.mlx_lm import make_prompt_cache
from ..models.cpu_products import numpy_products
from ..models.locate import HeadLocation, recorded_hidden
from ..models.vlm import forward, is_vlm
from . import Step, Steps

PYTHON, DIALOGUE = "python", "dialogue"
# The kinds in their order, each with its parts of the whole; most are files of `texts`.
SHARES = {"prose": 1, "documentation": 1, "code": 1, "markup": 1, "european": 2, "asian": 2}
SHARES |= {PYTHON: 1, DIALOGUE: 1}
EXCERPT_CHARACTERS = 3000  # of a module's source, from 40 % on, or of a help topic

BUILTIN_WINDOW = 64  # tokens; longer windows of built-in text take longer steps and gain nothing
CONTEXT = 8  # first tokens of such a window, whose states have seen too little and are left out
MIN_WINDOW = 16  # tokens; shorter rests are left out

TEXT_WINDOW = 512  # tokens of a user's text; each window starts afresh
READ_TOKENS = 2048  # of windows that are read together
MIN_STEP = 16  # tokens, however long they take
WEIGHTS_TOKENS = 32  # a pass reads all weights, which takes about as long as so many tokens
MIN_LENGTH = 2 / 3  # of a window, relative to the longest window read with it

BEGINNING = 300  # characters of a document that are a request
ANSWER_TOKENS = 64
DRAFTED_POSITIONS = 4_000  # docs/drafts.md has what fewer of them keep


def text_states(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    text: str,
    *,
    positions: int | None = None,
    **limits: float,
) -> Steps[tuple[np.ndarray, np.ndarray]]:
    """At most ``positions`` hidden states (N, D) float32 of a text, and the next tokens (N,) int64.

    Each window starts afresh, as a text does. Special tokens, such as chat markup, are understood.
    ``limits`` are those of `read_windows`. ValueError if there are fewer than two tokens.
    """
    token_ids = list(tokenizer.encode(text))[: None if positions is None else positions + 1]
    if len(token_ids) < 2:
        raise ValueError("The text is too short to measure anything on: give one of some pages.")
    first, *others = windows_of(token_ids, TEXT_WINDOW)
    beginning = beginning_of_text(tokenizer)  # the first window has it already
    windows = [first, *(beginning + window for window in others)]
    read = yield from read_windows(model, location, windows, "Reading", **limits)
    states = [read[0], *(window_states[len(beginning) :] for window_states in read[1:])]
    return np.concatenate(states), np.array(token_ids[1:], dtype=np.int64)


def builtin_states(
    model: nn.Module, tokenizer: Any, location: HeadLocation, positions: int, **limits: float
) -> Steps[tuple[np.ndarray, np.ndarray, bool]]:
    """As `text_states` of built-in text of many kinds, and whether the time limit cut it short."""
    beginning = beginning_of_text(tokenizer)
    windows = builtin_windows(tokenizer, positions)
    begun = [beginning + window for window in windows]
    read = yield from read_windows(model, location, begun, "Reading built-in text", **limits)
    done = [(s, window) for s, window in zip(read, windows, strict=True) if len(s)]
    states = [window_states[len(beginning) + CONTEXT :] for window_states, _ in done]
    next_ids = [token for _, window in done for token in window[CONTEXT + 1 :]]
    return np.concatenate(states), np.array(next_ids, dtype=np.int64), len(done) < len(windows)


def read_windows(
    model: nn.Module,
    location: HeadLocation,
    windows: Sequence[list[int]],
    stage: str = "Reading",
    *,
    seconds: float = math.inf,
    step_seconds: float = math.inf,
) -> Steps[list[np.ndarray]]:
    """Hidden states (n - 1, D) float32 of each window of n tokens, several windows at once.

    After ``seconds`` of the model's work no more are read, which leaves (0, 0) for them. A step
    takes about ``step_seconds``: less than a window if need be, but for models of mlx-vlm.
    """
    states = [np.empty((0, 0), np.float32)] * len(windows)
    inputs = [window[:-1] for window in windows]
    total, read, spent = sum(map(len, inputs)), 0, 0.0
    together: float = READ_TOKENS if step_seconds == math.inf else MIN_STEP
    waiting = list(range(len(windows)))
    while waiting and (not read or spent < seconds):
        # of those near in their order, which hold about so many tokens, the ones of like length
        n_tokens = np.cumsum([0, *(len(inputs[i]) for i in waiting)])
        near = sorted(waiting[: np.searchsorted(n_tokens, together)], key=lambda i: -len(inputs[i]))
        length = len(inputs[near[0]])
        alike = [i for i in near if len(inputs[i]) >= MIN_LENGTH * length]
        batch = alike[: max(1, int(together // length))]
        waiting = [i for i in waiting if i not in batch]
        # shorter ones are padded at the end, where no state looks
        tokens = mx.array([inputs[i] + [0] * (length - len(inputs[i])) for i in batch])
        n_parts = 1 if is_vlm(model) else math.ceil(tokens.size / together)
        cache = make_prompt_cache(model) if n_parts > 1 else None
        size, parts = math.ceil(length / n_parts), []
        for start in range(0, length, size):
            part = slice(start, start + size)
            began = monotonic()
            with numpy_products(model, location.module), recorded_hidden(location) as recorded:
                forward(model, tokens[:, part], cache)
                # only the states are evaluated, and the windows' logits are never computed
                parts.append(np.array(recorded[-1].astype(mx.float32)))
            took = max(monotonic() - began, 1e-6)
            spent += took
            fitting = (tokens[:, part].size + WEIGHTS_TOKENS) * step_seconds / took - WEIGHTS_TOKENS
            together = min(READ_TOKENS, max(MIN_STEP, fitting))
            read += sum(len(inputs[i][part]) for i in batch)
            yield Step(stage, read, total, "token")
        for i, window_states in zip(batch, np.concatenate(parts, axis=1), strict=True):
            states[i] = window_states[: len(inputs[i])]
    return states


def windows_of(token_ids: list[int], length: int) -> list[list[int]]:
    """Windows of ``length`` states. The token after a window's last state begins the next one."""
    starts = range(0, len(token_ids) - 1, length)
    return [token_ids[start : start + length + 1] for start in starts]


def beginning_of_text(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer begins each text, in a list; empty if there is none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer.encode("") else []


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


def _parts(name: str) -> list[str]:
    file = resources.files(__package__) / "texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").split("%%%%\n")


def builtin_documents() -> dict[str, list[str]]:
    """Documents by kind, but for dialogues, in a fixed order; those that Python has here."""
    documents = {kind: _parts(kind) for kind in SHARES if kind not in (PYTHON, DIALOGUE)}
    with suppress(ImportError):
        from pydoc_data.topics import topics

        named = [topics[name] for name in _parts("topics")[0].split() if name in topics]
        documents["documentation"] += [text[:EXCERPT_CHARACTERS] for text in named]
    documents[PYTHON] = []
    for name in _parts("modules")[0].split():
        with suppress(ImportError, OSError, UnicodeDecodeError):
            spec = importlib.util.find_spec(name)
            source = Path(spec.origin or "").read_text(encoding="utf-8") if spec else ""
            start = source.find("\n", len(source) * 2 // 5) + 1
            if source:
                documents[PYTHON].append(source[start : start + EXCERPT_CHARACTERS])
    return documents


def dialogues() -> list[list[dict[str, str]]]:
    """Conversations as lists of messages with ``role`` and ``content``."""
    conversations = []
    for document in _parts(DIALOGUE):
        _, *parts = re.split(r"^(User|Assistant): ", document, flags=re.MULTILINE)
        turns = zip(parts[::2], parts[1::2], strict=True)
        conversations.append([{"role": r.lower(), "content": text.strip()} for r, text in turns])
    return conversations


def builtin_windows(tokenizer: Any, positions: int) -> list[list[int]]:
    """Windows of built-in text without its beginning, at most ``positions``, of each kind its
    share. The kinds take turns, so that a time limit shortens all of them."""
    documents: dict[str, list[list[int]]] = {}
    for kind, contents in builtin_documents().items():
        documents[kind] = [list(tokenizer.encode(content)) for content in contents]
    if tokenizer.has_chat_template:
        chats = (tokenizer.apply_chat_template(each, tokenize=True) for each in dialogues())
    else:
        chats = (tokenizer.encode(text.strip()) for text in _parts(DIALOGUE))
    documents[DIALOGUE] = [list(token_ids) for token_ids in chats]
    beginning = beginning_of_text(tokenizer)
    ends = np.cumsum([0, *(SHARES[kind] for kind in documents)])
    sizes = np.diff(np.rint(positions * ends / ends[-1])).astype(int).tolist()
    turns: list[tuple[float, list[int]]] = []
    for texts, size in zip(documents.values(), sizes, strict=True):
        # in a fixed random order, the first windows of all documents first
        draw, placed = np.random.default_rng(0), []
        for token_ids in texts:
            text = token_ids[len(beginning) :] if token_ids[:1] == beginning else token_ids
            windows = enumerate(windows_of(text, BUILTIN_WINDOW))
            placed += [(place, draw.random(), window) for place, window in windows]
        left = size
        for _, _, window in sorted(placed):
            if len(window) >= MIN_WINDOW and left > 0:
                chosen = window[: CONTEXT + left + 1]
                turns.append(((size - left) / size, chosen))
                left -= len(chosen) - 1 - CONTEXT
    return [window for _, window in sorted(turns, key=lambda turn: turn[0])]


def builtin_requests() -> list[str]:
    """What users say in the dialogues, and the beginnings of the documents, in turns."""
    said = [m["content"] for messages in dialogues() for m in messages if m["role"] == "user"]
    kinds = [[text[:BEGINNING] for text in texts] for texts in builtin_documents().values()]
    return [text for turn in zip_longest(said, *kinds) for text in turn if text]


def drafted_states(
    location: HeadLocation,
    answers: Iterable[Iterator[int]],
    eos_token_ids: Iterable[int],
    *,
    seconds: float,
) -> Steps[np.ndarray]:
    """Hidden states (N, D) float32 at a drafter's head, up to 4,000, or until the time limit, while
    it writes the tokens of ``answers``, each until one of ``eos_token_ids``."""
    states = np.empty((0, location.rows().hidden_size), np.float32)
    ends, end, most = frozenset(eos_token_ids), monotonic() + seconds, DRAFTED_POSITIONS
    for answer in answers:
        with recorded_hidden(location) as recorded:
            next((token for token in answer if token in ends), None)
            drafted = [hidden.reshape(-1, hidden.shape[-1]) for hidden in recorded]
            if drafted:
                states = np.concatenate([states, as_float32(mx.concatenate(drafted))])
        yield Step("Recording drafts", min(len(states), most), most, "position")
        if len(states) >= most or monotonic() > end:
            break
    return states[:most]
