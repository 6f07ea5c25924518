"""Speculative decoding: the speed, and the share of accepted drafts, by the draft's probes.

The target verifies every draft, so its text does not depend on the draft's head. A draft that
scores fewer clusters is faster and wrong more often.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..common.timing import Spread, turns
from ..models.compat.generate import generate_step, speculative_generate_step
from ..models.install import dense_copy, installed_head

NO_DRAFT, DENSE_DRAFT = "no draft", "dense draft"
PROBES = (8, 16, 32, 64, 128, 256)
REQUESTS = (
    "Explain how a bridge carries its load.",
    "Write a Python function that counts the words of a text.",
    "What should I pack for a week in the mountains?",
    "Tell a short story about a lighthouse keeper.",
)


@dataclass
class _Runs:
    """Figures of one form. The acceptance is the same in each run."""

    drafted: int = 0
    accepted: int = 0
    tokens_per_second: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)


def draft_benchmark(
    target: nn.Module,
    draft: nn.Module,
    tokenizer,
    *,
    probes: Sequence[int] = PROBES,
    num_draft_tokens: int = 3,
    tokens: int = 40,
    rounds: int = 3,
    progress: bool = True,
) -> dict:
    """Decodes greedily without a draft, with the dense draft, and with the draft's FlashHead.

    Args:
        target: The decoded model.
        draft: A model with a FlashHead.
        tokenizer: Their tokenizer.
        probes: Numbers of clusters that the draft scores.
        num_draft_tokens: Tokens drafted at once.
        tokens: Tokens of each answer.
        rounds: Runs that count.
        progress: Show a bar.

    Returns:
        JSON-ready: for each form, tokens/s, the share of drafted tokens that the target accepts,
        and the share of answers that are the same as without a draft.
    """
    head = installed_head(draft)
    dense = dense_copy(draft)
    forms: dict[str, tuple[nn.Module | None, int | None]] = {
        NO_DRAFT: (None, None),
        DENSE_DRAFT: (dense, None),
    }
    forms |= {f"{n} probes": (draft, n) for n in probes if n < head.n_clusters}
    prompts = [_prompt(tokenizer, request) for request in REQUESTS]
    measured = {name: _Runs() for name in forms}
    total = (rounds + 1) * len(forms)
    with tqdm(
        total=total, desc="Timing drafts", unit="run", leave=False, disable=not progress
    ) as bar:
        for number, name in turns(forms, rounds):
            model, n_probes = forms[name]
            with head.settings(n_probes=n_probes):
                answers = [
                    _answer(target, model, prompt, num_draft_tokens, tokens) for prompt in prompts
                ]
            n_draft = 0 if model is None else num_draft_tokens
            _add(measured[name], answers, n_draft, timed=number > 0)
            bar.update()
    expected = measured[NO_DRAFT].texts
    return {
        "num_draft_tokens": num_draft_tokens,
        "tokens": tokens,
        "answers": len(prompts),
        "n_clusters": head.n_clusters,
        "forms": [
            {
                "name": name,
                "n_probes": forms[name][1],
                "tokens_per_second": Spread.of(runs.tokens_per_second).to_dict(),
                "acceptance": runs.accepted / runs.drafted if runs.drafted else None,
                "same_answers": sum(map(list.__eq__, runs.texts, expected)) / len(expected),
            }
            for name, runs in measured.items()
        ],
    }


# Tokens, whether each was drafted, and the seconds from the first to the last.
_Answer = tuple[list[int], list[bool], float]


def _answer(
    target: nn.Module, draft: nn.Module | None, prompt: list[int], n_draft: int, tokens: int
) -> _Answer:
    ids = mx.array(prompt)
    steps: Iterator[tuple[Any, bool]]
    if draft is None:
        steps = ((t, False) for t, _ in generate_step(ids, target, max_tokens=tokens))
    else:
        found = speculative_generate_step(
            ids, target, draft, num_draft_tokens=n_draft, max_tokens=tokens
        )
        steps = ((token, drafted) for token, _, drafted in found)
    text: list[int] = []
    drafted: list[bool] = []
    start = last = time.perf_counter()
    for token, is_drafted in steps:
        last = time.perf_counter()
        if not text:
            start = last
        text.append(token)
        drafted.append(is_drafted)
    return text, drafted, last - start


def _add(runs: _Runs, answers: list[_Answer], n_draft: int, *, timed: bool) -> None:
    runs.texts = [text for text, *_ in answers]
    runs.accepted = sum(sum(drafted) for _, drafted, _ in answers)
    runs.drafted = sum(_n_drafted(drafted, n_draft) for _, drafted, _ in answers)
    if timed:
        n_tokens = sum(len(text) - 1 for text, *_ in answers)
        runs.tokens_per_second.append(n_tokens / sum(seconds for *_, seconds in answers))


def _n_drafted(drafted: list[bool], n_draft: int) -> int:
    """The number of tokens drafted for an answer.

    A verification ends with a token of the target's own, except the last one. The draft for it has
    as many tokens as the answer has room for.
    """
    starts = [0, *(i + 1 for i, is_drafted in enumerate(drafted) if not is_drafted)]
    return sum(min(n_draft, len(drafted) - start) for start in starts)


def _prompt(tokenizer, request: str) -> list[int]:
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(request))
    messages = [{"role": "user", "content": request}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
