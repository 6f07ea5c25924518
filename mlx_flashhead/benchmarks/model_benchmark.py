"""Times a model's decoding: dense with mlx-lm's loop and sampler, with FlashHead, unverified."""

import argparse
import itertools
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from rich.table import Table

from ..common.tables import new_table, percent
from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.loop import verified_steps
from ..decoding.policy import Proposer, policy_of
from ..decoding.sampler import make_sampler
from ..head.backend import scored_logits_agree
from ..loading.load import load
from ..models.compat.mlx_lm import BatchGenerator, generate_step, sample_utils
from ..models.install import dense_copy, hidden_dtype, installed_head
from . import SAMPLERS
from .reporting import Case, cells, spread

DENSE, FLASH_HEAD, UNVERIFIED = "dense", "FlashHead", "unverified"
PROMPT = (
    "The old bridge over the river had been closed for years, and nobody in the village could say "
    "who had built it. One morning in spring, a stranger came and"
)


class Form(NamedTuple):
    """A way to decode: a model, and its loops with the arguments of mlx-lm's."""

    model: nn.Module
    steps: Callable[..., Any] = generate_step
    generator: Callable[..., Any] = BatchGenerator
    make_sampler: Callable[..., Any] = sample_utils.make_sampler

    def decode(
        self, prompt: list[int], batch: int, n_tokens: int, sampling: dict
    ) -> tuple[float, list[int]]:
        """Seconds per token, the mean of ``n_tokens`` after the first, and the first text's tokens.
        The end of a text does not end a run."""
        sampler, times, tokens = self.make_sampler(**sampling), [], []
        if batch == 1:
            limits = {"max_tokens": n_tokens + 1, "sampler": sampler}
            for token, _ in self.steps(mx.array(prompt), self.model, **limits):
                times.append(time.perf_counter())
                tokens.append(int(token))
        else:
            generator = self.generator(self.model, sampler=sampler)
            first, *_ = generator.insert([prompt] * batch, [n_tokens + 1] * batch)
            while responses := generator.next_generated():
                times.append(time.perf_counter())
                tokens += [response.token for response in responses if response.uid == first]
            generator.close()
        return (times[-1] - times[0]) / n_tokens, tokens


def with_flash_head(model: nn.Module, *, verify: bool) -> Form:
    """This package's loops for a model with a FlashHead."""
    how: dict[str, Any] = {"proposer": Proposer(model, verify=verify), "logprobs": False}
    steps, generator = partial(verified_steps, **how), partial(VerifiedBatchGenerator, **how)
    return Form(model, steps, generator, make_sampler)


def cases(args: argparse.Namespace) -> Generator[Case]:
    """Each sampler and batch. A FlashHead is timed even if the model would stay dense here."""
    source = {"flash_head": args.flash_head, "build": not args.no_build}
    flash, tokenizer = load(args.model, n_probes=args.n_probes, **source)
    head, agreement = installed_head(flash), None
    if head.backend == "metal":  # where scored logits should equal MLX's to the last bit
        agreement = scored_logits_agree(head.steps, hidden_dtype(flash))
    about = {
        "model": Path(args.model).name,
        "head_bits": head.clustered.rows.format.bits,
        "n_probes": {FLASH_HEAD: head.n_probes, UNVERIFIED: head.unverified_probes},
        "n_clusters": head.n_clusters,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "equal_logits": agreement,
        "keeps_dense_head": policy_of(head).dense,
        "tokens": args.tokens,
    }
    policy_of(head).dense = False
    forms = {
        DENSE: Form(dense_copy(flash)),
        FLASH_HEAD: with_flash_head(flash, verify=True),
        UNVERIFIED: with_flash_head(flash, verify=False),
    }
    prompt = tokenizer.encode(PROMPT)
    for sampler, batch in itertools.product(args.sampler or SAMPLERS, args.batch or (1, 4, 8)):
        run = (prompt, batch, args.tokens, SAMPLERS[sampler])

        def seconds(form: Form, _: int, run: tuple = run) -> float:
            return form.decode(*run)[0]

        timers = {name: partial(seconds, form) for name, form in forms.items()}
        yield Case(f"{sampler}, batch {batch}", timers, partial(summary, about, sampler, batch))


def summary(about: dict, sampler: str, batch: int, seconds: dict[str, list[float]]) -> dict:
    """Milliseconds, tokens/s of all sequences and ratios of the medians to dense, JSON-ready."""
    token_ms = {form: spread(times, 1000) for form, times in seconds.items()}
    medians = {form: ms["median"] for form, ms in token_ms.items()}
    return about | {
        "sampler": sampler,
        "batch": batch,
        "token_ms": token_ms,
        "tokens_per_second": {form: 1000 * batch / ms for form, ms in medians.items()},
        "times_faster": {form: medians[DENSE] / medians[form] for form in medians if form != DENSE},
    }


def make_table(result: dict) -> Table:
    probes = result["n_probes"]
    notes = "unverified: the head's own choices, so the text may differ."
    if result["equal_logits"] is not None:
        notes += f"\n{percent(result['equal_logits'], 3)} of the scored logits equal MLX's."
    if result["keeps_dense_head"]:
        notes += "\nFlashHead gains too little on this machine: the model stays dense by default."
    table = new_table(
        f"{result['model']}: {result['sampler']}, batch {result['batch']}, {probes[FLASH_HEAD]:,} "
        f"clusters of {result['n_clusters']:,} scored, {probes[UNVERIFIED]:,} unverified",
        ("", "ms", "quartiles", "tokens/s", "faster"),
        notes,
    )
    for form, ms in result["token_ms"].items():
        faster = "" if form == DENSE else f"{result['times_faster'][form]:.2f} x"
        table.add_row(form, *cells(ms), f"{result['tokens_per_second'][form]:.1f}", faster)
    return table
