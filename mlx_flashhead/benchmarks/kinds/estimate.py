"""Estimates the time per token on an Apple chip, from bytes and kernels.

It is given for the head and the model, beside public speeds. Nothing is run.
"""

import argparse
from collections.abc import Iterator
from statistics import median

from ...common.quantities import percent
from ...common.tables import new_table, show
from ...loading import cache
from ...loading.look_up import HeadOptions, head_beside
from ...models.dense import load_dense
from ...models.fetch import resolve
from ...models.locate import find_head
from ..report import ANY_MODEL
from ..roofline import (
    CHIPS,
    CONSTANTS,
    Chip,
    Estimate,
    find_chip,
    of_bits,
    of_bytes,
    public_speeds,
)
from ..shapes import SHAPES, ModelShape, model_shape

NOTE = (
    "AN ESTIMATE, NOT A MEASUREMENT: no Apple GPU was used. One sequence, greedy, short context. "
    "Of {n} public speeds of dense models on Macs it misses half by less than {median}, and "
    "all by {least:+.0f} % to {most:+.0f} %."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this kind."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=ANY_MODEL)
    what.add_argument("--shape", help=f"A known shape: {', '.join(SHAPES)}.")
    parser.add_argument("--chip", required=True, help=f"One of {', '.join(CHIPS)}.")


def run(args: argparse.Namespace) -> None:
    """Prints the forms, the constants, and public speeds of the chip: 80 columns."""
    chip = find_chip(args.chip)  # refuses an unknown one before a model is loaded
    shape = _shape(args)
    table = new_table(
        f"ESTIMATE: {shape.name} on {chip.name}, ms per token",
        ("body", "head rows", "head", "head MB", "head ms", "model ms", "tokens/s", "gain"),
        f"{shape.n_probes} clusters of {shape.cluster_size} rows, of {shape.n_clusters} clusters"
        + ("" if shape.measured_probes else " (assumed)"),
        left=3,
    )
    for precision, dense, flash in _estimates(shape, chip):
        gain = f"{dense.model_ms / flash.model_ms:.2f}x"
        for words, form, last in (
            ((*precision, "dense"), dense, ""),
            (("", "", "FlashHead"), flash, gain),
        ):
            table.add_row(
                *words,
                f"{form.head_mb:.1f}",
                f"{form.head_ms:.3f}",
                f"{form.model_ms:.2f}",
                f"{1000 / form.model_ms:.0f}",
                last,
            )
        table.add_section()
    speeds = list(public_speeds())
    errors = [100 * speed["error"] for speed in speeds]
    half = percent(median(map(abs, errors)) / 100, 0)
    show(
        table,
        f"{chip.gb_s:.0f} GB/s, of {chip.peak_gb_s:g} by Apple",
        *(f"{name:11} {value:.3g} {source}" for name, (value, source) in CONSTANTS.items()),
        "",
        NOTE.format(n=len(errors), median=half, least=min(errors), most=max(errors)),
    )
    public = new_table(
        f"public speeds of {chip.name}",
        ("dense model", "bits", "tokens/s", "ms", "estimated ms", "error"),
    )
    for speed, error in zip(speeds, errors, strict=True):
        if speed["chip"] == chip.name:
            public.add_row(
                SHAPES[speed["model"]].name,
                f"{speed['bits']}",
                f"{speed['tokens_per_second']:g}",
                f"{1000 / speed['tokens_per_second']:.2f}",
                f"{speed['estimated_ms']:.2f}",
                f"{error:+.0f} %",
            )
    show(public if public.row_count else f"None of them is of {chip.name}.")


def _estimates(
    shape: ModelShape, chip: Chip
) -> Iterator[tuple[tuple[str, str], Estimate, Estimate]]:
    """The model as stored, if it is, then in 16 bits, 4 bits, and 4 bits with a finer head."""
    if shape.stored:
        stored = of_bytes(shape, chip, shape.body_bytes, shape.head_bytes)
        yield ("as stored", shape.stored), *stored
    for bits in ((16, 16), (4, 16), (4, 8), (4, 4)):
        body, head = (f"{each}-bit" for each in bits)
        yield (body, head), *of_bits(shape, chip, *bits)


def _shape(args: argparse.Namespace) -> ModelShape:
    if args.shape is not None:
        if args.shape not in SHAPES:
            raise ValueError(
                f"There is no shape {args.shape!r}: choose one of {', '.join(SHAPES)}."
            )
        return SHAPES[args.shape]
    folder, options = resolve(args.model), HeadOptions()
    model, _, _ = load_dense(folder, lazy=True)
    stored = head_beside(folder, options) or cache.find(find_head(model).rows(), options.say)
    return model_shape(folder.name, model, None if stored is None else stored.index)
