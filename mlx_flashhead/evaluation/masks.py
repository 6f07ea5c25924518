"""How often the choice under masks, biases and penalties is the dense head's.

At each position of a text the same processors change the dense head's logits and FlashHead's. Two
choices of FlashHead are compared with the dense head's: the one with estimates for the tokens that
were not scored, and the one after the second look that every loop of this package takes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..conversion.calibration import text_states
from ..models.compat.sample_utils import make_logits_processors
from ..models.exact import Processor, exact_processors
from ..models.finish import Finish, finish_of
from ..models.install import installed_head
from ..models.locate import find_head

RANDOM_SIZES = (10, 100, 1_000, 10_000)
PUNCTUATION = set('{}[]:,"')
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 1.0,
    "frequency_penalty": 0.5,
}
PENALISED_TOKENS = 20  # mlx-lm's own number
# The bias is this far above or below the value that makes a token the best one, in nats.
BIAS_MARGIN = 0.5
BATCH = 16


@dataclass(frozen=True)
class Choice:
    """Figures of one kind of change.

    Attributes:
        change: The change of the logits.
        estimates: Share of positions with the dense head's choice, without a second look.
        exact: The same with a second look.
        differing: Positions whose choice differs even so.
    """

    change: str
    estimates: float
    exact: float
    differing: int


@dataclass(frozen=True)
class MaskEvaluation:
    """Figures of one text.

    Attributes:
        positions: Number of positions.
        n_probes: Clusters scored per position.
        n_clusters: Number of clusters.
        choices: One entry for each kind of change.
    """

    positions: int
    n_probes: int
    n_clusters: int
    choices: list[Choice]

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


def evaluate_masks(
    model: nn.Module,
    tokenizer,
    text: str,
    *,
    positions: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MaskEvaluation:
    """Compares the choices of FlashHead and the dense head on ``text``.

    Args:
        model: A model loaded by ``mlx_flashhead.load``.
        tokenizer: Its tokenizer.
        text: A text that calibration has not seen.
        positions: How many positions at most; default: all of the text's.
        seed: Seed of the random masks and of the tokens that get a bias.
        progress: Show bars.

    Raises:
        ValueError: If the model has no FlashHead, or the text is too short.
    """
    head, finish = installed_head(model), finish_of(model)
    states, next_ids = text_states(
        model, tokenizer, find_head(model), text, positions=positions, progress=progress
    )
    changes = _changes(tokenizer, head.vocab_size, np.random.default_rng(seed))
    right = {name: np.zeros(2, dtype=int) for name, _ in changes}
    with (
        head.settings(max_positions=BATCH),
        tqdm(total=len(states), desc="Masks", unit="position", disable=not progress) as bar,
    ):
        for start in range(0, len(states), BATCH):
            hidden = mx.array(states[start : start + BATCH])
            dense = finish(head.dense_logits(hidden))
            contexts = [
                mx.array(next_ids[max(0, i - PENALISED_TOKENS) : i].astype(np.uint32))
                for i in range(start, start + len(hidden))
            ]
            for name, make in changes:
                right[name] += _agree(model, finish, hidden, dense, contexts, make(dense))
            bar.update(len(hidden))
    n = len(states)
    choices = [
        Choice(name, estimates / n, exact / n, n - exact)
        for name, (estimates, exact) in ((name, pair.tolist()) for name, pair in right.items())
    ]
    return MaskEvaluation(n, head.n_probes, head.n_clusters, choices)


# Makes the processors of each row from the dense logits (R, V).
Change = Callable[[mx.array], list[list[Processor]]]


def _changes(tokenizer, vocab_size: int, rng: np.random.Generator) -> list[tuple[str, Change]]:
    changes: list[tuple[str, Change]] = []
    for size in RANDOM_SIZES:
        if size < vocab_size // 2:
            changes.append((f"{size:,} random tokens", _random_mask(size, vocab_size, rng)))
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    texts = [
        (i, tokenizer.convert_tokens_to_string([p]).strip()) for i, p in enumerate(pieces) if p
    ]
    for name, ids in (
        ("digits only", [i for i, text in texts if text.isascii() and text.isdigit()]),
        ("JSON punctuation only", [i for i, text in texts if text and set(text) <= PUNCTUATION]),
    ):
        if ids:
            changes.append((name, _same_for_all([_allowing(ids, vocab_size)])))

    def bias(dense: mx.array) -> list[list[Processor]]:
        best = np.array(dense.max(axis=-1).astype(mx.float32))
        rows = []
        for row, token in enumerate(rng.integers(0, vocab_size, len(best)).tolist()):
            needed = best[row] - dense[row, token].item()
            value = float(needed + BIAS_MARGIN * rng.choice((-1, 1)))
            rows.append(make_logits_processors(logit_bias={token: value}))
        return rows

    penalties = _same_for_all(make_logits_processors(**PENALTIES))
    changes += [("logit_bias near the limit", bias), ("penalties", penalties)]
    return changes


def _same_for_all(processors: list[Processor]) -> Change:
    return lambda dense: [processors] * len(dense)


def _random_mask(size: int, vocab_size: int, rng: np.random.Generator) -> Change:
    def make(dense: mx.array) -> list[list[Processor]]:
        drawn = (rng.choice(vocab_size, size, replace=False) for _ in range(len(dense)))
        return [[_allowing(ids, vocab_size)] for ids in drawn]

    return make


def _allowing(ids, vocab_size: int) -> Processor:
    allowed = np.full(vocab_size, -np.inf, dtype=np.float32)
    allowed[ids] = 0
    mask = mx.array(allowed)
    return lambda _, logits: logits + mask.astype(logits.dtype)


def _agree(
    model: nn.Module,
    finish: Finish,
    hidden: mx.array,
    dense: mx.array,
    contexts: list[mx.array],
    processors: list[list[Processor]],
) -> np.ndarray:
    """How many rows have the dense head's choice: (2,), without and with the second look."""
    exact = [
        exact_processors(row, model) for row in processors
    ]  # they see the call on the next line
    logits = finish(installed_head(model)(hidden))
    right = np.zeros(2, dtype=int)
    for row, context in enumerate(contexts):
        choices = [
            mx.argmax(changed)
            for changed in (
                _run(processors[row], context, dense[row : row + 1]),
                _run(processors[row], context, logits[row : row + 1]),
                _run(exact[row], context, logits[row : row + 1]),
            )
        ]
        mx.eval(choices)
        best, *found = (choice.item() for choice in choices)
        right += [choice == best for choice in found]
    return right


def _run(processors: list[Processor], tokens: mx.array, logits: mx.array) -> mx.array:
    for processor in processors:
        logits = processor(tokens, logits)
    return logits
