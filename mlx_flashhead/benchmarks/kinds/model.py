"""A whole model: the time of a token, dense, with FlashHead and without a head.

The dense model decodes with mlx-lm's loop and sampler, and so does the model without a head. That
one gives stored logits, and shows how much a head that costs nothing saves. With FlashHead the loop
and the sampler are this package's, and the time holds the checks of its tokens.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ...common.arguments import whole_number
from ...common.quantities import percent
from ...common.tables import new_table
from ...common.timing import Spread, in_turns
from ...loading.load import load
from ...loading.look_up import add_check_option, look_up_options
from ...lossless.batch import CheckedBatchGenerator
from ...lossless.loop import checked_steps
from ...lossless.proposals import Proposer
from ...lossless.sampler import make_sampler
from ...models.compat import sample_utils
from ...models.compat.generate import BatchGenerator, generate_step
from ...models.install import dense_copy, installed_head
from ...models.locate import find_head, recorded_hidden
from ..report import Round, add_model_arguments, add_number, add_report_arguments, report

if TYPE_CHECKING:
    from rich.table import Table

HELP = "time a model's decoding"
DESCRIPTION = "Time decoding: dense, with FlashHead and its checks, and without any head."
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this kind."""
    add_model_arguments(parser)
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        action="append",
        help="May be given several times (default: all).",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        action="append",
        help="Sequences at once; may be given several times (default: 1, 4 and 8).",
    )
    add_number(parser, "--tokens", 48, "Tokens of a run")
    add_check_option(parser)
    add_report_arguments(parser, rounds=8)


def run(args: argparse.Namespace) -> None:
    """Times the model of the command line."""
    report(args, measure(args), make_table, draw)


def measure(args: argparse.Namespace) -> Iterator[Round]:
    """Times each sampler and batch, the three forms in turns.

    Runs are short, so that other work on the machine slows all three alike.
    """
    flash, tokenizer = load(args.model, n_probes=args.n_probes, **look_up_options(args))
    head, dense = installed_head(flash), dense_copy(flash)
    about = {
        "model": Path(args.model).name,
        "checked": not args.no_check,
        "n_probes": head.n_probes if args.no_check else head.checked_probes,
        "n_clusters": head.n_clusters,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "tokens": args.tokens,
    }
    settings = list(itertools.product(args.sampler or SAMPLERS, args.batch or (1, 4, 8)))
    total = (args.rounds + 1) * len(settings)
    finished: list[dict] = []
    done = 0
    yield Round(0, total, f"{args.tokens} tokens each: dense, FlashHead, no head", [])
    for sampler, batch in settings:
        decodes = partial(
            decode_seconds, tokenizer.encode(PROMPT), batch, args.tokens, SAMPLERS[sampler]
        )
        results = finished
        for seconds in in_turns(_timers(decodes, dense, flash, not args.no_check), args.rounds):
            done += 1
            news = f"{sampler}, batch {batch}: warm"
            if seconds[DENSE]:
                results = [*finished, about | summary(sampler, batch, seconds)]
                latest = (f"{form} {1000 * taken[-1]:.1f}" for form, taken in seconds.items())
                news = f"{sampler}, batch {batch}: {', '.join(latest)} ms"
            yield Round(done, total, news, results)
        finished = results


def _timers(
    decodes: Callable[..., float], dense: nn.Module, flash: nn.Module, check: bool
) -> dict[str, Callable[[int], float]]:
    checked = lossless(flash, check)
    return {
        DENSE: lambda _: decodes(dense, Loops()),
        FLASH_HEAD: lambda _: decodes(flash, checked),
        NO_HEAD: lambda _: decodes(dense, Loops(), partial(without_head, dense)),
    }


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


@dataclass(frozen=True)
class Loops:
    """How a model decodes: functions with the arguments of mlx-lm's."""

    steps: Callable[..., Any] = generate_step
    generator: Callable[..., Any] = BatchGenerator
    make_sampler: Callable[..., Any] = sample_utils.make_sampler


def lossless(model: nn.Module, check: bool) -> Loops:
    """This package's loops for a model with a FlashHead."""
    proposer = Proposer(model, check=check)
    return Loops(
        partial(checked_steps, proposer=proposer, logprobs=False),
        partial(CheckedBatchGenerator, proposer=proposer, logprobs=False),
        make_sampler,
    )


def decode_seconds(
    prompt: list[int],
    batch: int,
    tokens: int,
    sampling: dict[str, Any],
    model: nn.Module,
    loops: Loops,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """Seconds of one token of each sequence: the mean of ``tokens`` after the first.

    Args:
        prompt: The prompt's tokens, the same for all sequences.
        batch: Sequences at once.
        tokens: Tokens that count.
        sampling: Arguments of ``make_sampler``.
        model: The model.
        loops: How it decodes.
        context: Makes the context in which it decodes.
    """
    sampler = loops.make_sampler(**sampling)
    times = []
    with context():
        if batch == 1:
            steps = loops.steps(mx.array(prompt), model, max_tokens=tokens + 1, sampler=sampler)
            for _ in steps:
                times.append(time.perf_counter())
        else:
            generator = loops.generator(model, sampler=sampler)
            generator.insert([prompt] * batch, [tokens + 1] * batch)
            while generator.next_generated():
                times.append(time.perf_counter())
            generator.close()
    return (times[-1] - times[0]) / tokens


def summary(sampler: str, batch: int, seconds: dict[str, list[float]]) -> dict:
    """Milliseconds, tokens/s of all sequences and ratios of the medians, JSON-ready.

    ``share_of_free_head_saved`` is (dense - FlashHead) / (dense - no head). A faster sampler counts
    too, so it can be above 1. It is None where the machine was too busy to tell dense from no head.
    """
    step = {title: Spread.of(taken).scaled(1000) for title, taken in seconds.items()}
    dense, flash, free = (step[title].median for title in (DENSE, FLASH_HEAD, NO_HEAD))
    return {
        "sampler": sampler,
        "batch": batch,
        "token_ms": {title: spread.to_dict() for title, spread in step.items()},
        "tokens_per_second": {title: 1000 * batch / s.median for title, s in step.items()},
        "times_faster": dense / flash,
        "times_faster_with_a_free_head": dense / free,
        "share_of_free_head_saved": (dense - flash) / (dense - free) if dense > free else None,
    }


def make_table(one: dict) -> "Table":
    """The table of one sampler and batch."""
    saved = one["share_of_free_head_saved"]
    table = new_table(
        f"{one['model']}: {one['sampler']}, batch {one['batch']}, {one['n_probes']:,} of "
        f"{one['n_clusters']:,} clusters{'' if one['checked'] else ', no check'}",
        ("", "ms", "quartiles", "tokens/s", "faster"),
        "no head: a head that costs nothing. FlashHead saves "
        f"{'–' if saved is None else percent(saved, 0)} of what it would.",
    )
    ratios = {FLASH_HEAD: "times_faster", NO_HEAD: "times_faster_with_a_free_head"}
    for name, ms in one["token_ms"].items():
        table.add_row(
            name,
            f"{ms['median']:.2f}",
            f"{ms['lower']:.2f}–{ms['upper']:.2f}",
            f"{one['tokens_per_second'][name]:.1f}",
            f"{one[ratios[name]]:.2f} x" if name in ratios else "",
        )
    return table


def draw(axis: Any, one: dict) -> None:
    """Draws the milliseconds of a step."""
    colors = {DENSE: "tab:gray", FLASH_HEAD: "tab:blue", NO_HEAD: "lightgray"}
    for name, ms in one["token_ms"].items():
        axis.bar_label(axis.barh(name, ms["median"], color=colors[name]), fmt=" %.1f")
    axis.set(title=f"{one['model']}, {one['sampler']}, batch {one['batch']}", xlabel="ms per token")
