"""Times a model's decoding: dense with mlx-lm's loop and sampler, with FlashHead, unverified."""

import argparse
import itertools
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ..common.tables import new_table, percent
from ..decoding.policy import policy_of
from ..loading.load import load
from ..models.compat.mlx_lm import make_prompt_cache
from ..models.install import dense_copy, hidden_dtype, installed_head
from ..models.vlm import is_vlm
from ..wide.step import WideSteps
from ..wide.trial import established_costs
from . import SAMPLERS
from .reporting import Case, spread, spread_cells
from .variants import DENSE, FLASH_HEAD, UNVERIFIED, Variant, with_flash_head

DEFAULT_BATCHES = (1, 4, 8)
PROMPT = (
    "The old bridge over the river had been closed for years, and nobody in the village could say "
    "who had built it. One morning in spring, a stranger came and"
)


def cases(args: argparse.Namespace) -> Generator[Case | dict[str, Any]]:
    """Yields a case for each sampler and batch; for a report first what else it has.

    A FlashHead is timed even if the model would stay dense here.

    Args:
        args: The flags of ``mlx_flashhead.benchmark model``.
    """
    model, tokenizer = load(
        args.model,
        n_probes=args.n_probes,
        flash_head=args.flash_head,
        build=not args.no_build,
    )
    head = installed_head(model)
    equal_logits = None
    if head.backend == "metal":
        # There scored logits should equal MLX's to the last bit.
        equal_logits = head.scored_logits_agree(hidden_dtype(model))
    about = {
        "model": Path(args.model).name,
        "head_bits": head.clustered.rows.format.bits,
        "n_probes": {FLASH_HEAD: head.n_probes, UNVERIFIED: head.unverified_probes},
        "n_clusters": head.n_clusters,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "equal_logits": equal_logits,
        "keeps_dense_head": policy_of(head).dense,
        "tokens": args.tokens,
    }
    policy_of(head).dense = False
    variants = {
        DENSE: Variant(dense_copy(model)),
        FLASH_HEAD: with_flash_head(model, verify=True),
        UNVERIFIED: with_flash_head(model, verify=False),
    }
    prompt = tokenizer.encode(PROMPT)
    if args.report and not is_vlm(model):
        # A step of several tokens, relative to a single one, by their number.
        costs = established_costs(WideSteps.of(model), make_prompt_cache(model))
        yield {"wide": {"established": list(costs), "costs": costs}}

    def seconds(variant: Variant, sampler: str, batch: int, _: int) -> float:
        return variant.decode(prompt, batch, args.tokens, SAMPLERS[sampler])[0]

    for sampler, batch in itertools.product(
        args.sampler or SAMPLERS, args.batch or DEFAULT_BATCHES
    ):
        timers = {
            name: partial(seconds, variant, sampler, batch) for name, variant in variants.items()
        }
        yield Case(f"{sampler}, batch {batch}", timers, partial(summary, about, sampler, batch))


def summary(
    about: dict[str, Any], sampler: str, batch: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """The figures of one sampler and batch.

    Args:
        about: What all cases share: the model and its head.
        sampler: One of `SAMPLERS`.
        batch: Sequences at once.
        seconds: The times of the rounds, by variant.

    Returns:
        ``about``, milliseconds, tokens/s of all texts, and ratios of the medians to dense,
        JSON-ready.
    """
    token_ms = {variant: spread(times, 1000) for variant, times in seconds.items()}
    medians = {variant: ms["median"] for variant, ms in token_ms.items()}
    return about | {
        "sampler": sampler,
        "batch": batch,
        "token_ms": token_ms,
        "tokens_per_second": {variant: 1000 * batch / ms for variant, ms in medians.items()},
        "times_faster": {
            variant: medians[DENSE] / ms for variant, ms in medians.items() if variant != DENSE
        },
    }


def make_table(figures: dict[str, Any]) -> Table:
    """A table with a line for each variant.

    Args:
        figures: What `summary` returns.
    """
    probes = figures["n_probes"]
    caption = "unverified: the head's own choices, so the text may differ."
    if figures["equal_logits"] is not None:
        share = percent(figures["equal_logits"], 3)
        caption += f"\n{share} of the scored logits equal MLX's."
    if figures["keeps_dense_head"]:
        caption += "\nFlashHead gains too little on this machine: the model stays dense by default."
    title = (
        f"{figures['model']}: {figures['sampler']}, batch {figures['batch']}, "
        f"{probes[FLASH_HEAD]:,} clusters of {figures['n_clusters']:,} scored, "
        f"{probes[UNVERIFIED]:,} unverified"
    )
    table = new_table(title, ("", "ms", "quartiles", "tokens/s", "faster"), caption)
    for variant, ms in figures["token_ms"].items():
        speed = f"{figures['tokens_per_second'][variant]:.1f}"
        faster = ""
        if variant != DENSE:
            faster = f"{figures['times_faster'][variant]:.2f} x"
        table.add_row(variant, *spread_cells(ms), speed, faster)
    return table
