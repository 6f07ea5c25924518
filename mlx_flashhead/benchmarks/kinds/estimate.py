"""Estimates the time per token on an Apple chip, from bytes and kernels.

It is given for the head and the model, beside public speeds. Nothing is run.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median

from ...common.command import check_writable
from ...common.tables import new_table, percent, show
from ...loading import head_cache as cache
from ...loading.sources import HeadOptions, bundled_head
from ...models.dense import load_dense
from ...models.fetch import resolve
from ...models.locate import find_head
from ..report import ANY_MODEL, add_number
from ..roofline import CHIPS, CONSTANTS, Chip, estimates, find_chip, formula, public_speeds
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
    add_number(
        parser,
        "--n-probes",
        None,
        "Clusters scored per token (default: those of the model's FlashHead, in its folder or kept "
        "from before, else a sixteenth, 512 at least).",
    )
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")


def run(args: argparse.Namespace) -> None:
    """Prints the estimate, and writes it to the file of ``--json``."""
    chip = find_chip(args.chip)  # refuses an unknown one before a model is loaded
    if args.json:
        check_writable("--json", args.json)
    figures = to_dict(_shape(args), chip)
    print_estimates(figures)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def to_dict(shape: ModelShape, chip: Chip) -> dict:
    """JSON-ready, marked as an estimate."""
    return {
        "kind": "estimate",
        "measured": False,
        "chip": chip.name,
        "peak_gb_s": chip.peak_gb_s,
        "bandwidth_gb_s": chip.gb_s,
        "constants": {name: {"value": v, "source": s} for name, (v, s) in CONSTANTS.items()},
        "formula": formula(shape).splitlines(),
        "model": asdict(shape),
        "estimates": [asdict(estimate) for estimate in estimates(shape, chip)],
        "public_speeds": list(public_speeds()),
    }


def print_estimates(figures: dict) -> None:
    """Prints the forms, the formula, its constants, and public speeds of the chip: 80 columns."""
    chip, speeds = figures["chip"], figures["public_speeds"]
    table = new_table(
        f"ESTIMATE: {figures['model']['name']} on {chip}, ms per token",
        ("body", "head rows", "head", "head MB", "head ms", "model ms", "tokens/s", "gain"),
        left=3,
    )
    dense_ms = 0.0
    for estimate in figures["estimates"]:
        dense, ms = estimate["form"] == "dense", estimate["model_ms"]
        table.add_row(
            *((estimate["body"], estimate["rows"]) if dense else ("", "")),
            estimate["form"],
            f"{estimate['head_mb']:.1f}",
            f"{estimate['head_ms']:.3f}",
            f"{ms:.2f}",
            f"{1000 / ms:.0f}",
            "" if dense else f"{dense_ms / ms:.2f}x",
            end_section=not dense,
        )
        dense_ms = ms
    errors = [100 * speed["error"] for speed in speeds]
    half = percent(median(map(abs, errors)) / 100, 0)
    show(
        table,
        *figures["formula"],
        "",
        f"{figures['bandwidth_gb_s']:.0f} GB/s, of {figures['peak_gb_s']:g} by Apple",
        *(f"{name:11} {value:.3g} {source}" for name, (value, source) in CONSTANTS.items()),
        "",
        NOTE.format(n=len(errors), median=half, least=min(errors), most=max(errors)),
    )
    public = new_table(
        f"public speeds of {chip}",
        ("dense model", "bits", "tokens/s", "ms", "estimated ms", "error"),
    )
    for speed, error in zip(speeds, errors, strict=True):
        if speed["chip"] == chip:
            public.add_row(
                SHAPES[speed["model"]].name,
                f"{speed['bits']}",
                f"{speed['tokens_per_second']:g}",
                f"{1000 / speed['tokens_per_second']:.2f}",
                f"{speed['estimated_ms']:.2f}",
                f"{error:+.0f} %",
            )
    show(public if public.row_count else f"None of them is of {chip}.")


def _shape(args: argparse.Namespace) -> ModelShape:
    if args.model is not None:
        folder = resolve(args.model)
        model, _, _ = load_dense(folder, lazy=True)
        options = HeadOptions()
        stored = bundled_head(folder, options) or cache.find(find_head(model).rows(), options.say)
        shape = model_shape(folder.name, model, None if stored is None else stored.index)
    elif args.shape in SHAPES:
        shape = SHAPES[args.shape]
    else:
        raise ValueError(f"There is no shape {args.shape!r}: choose one of {', '.join(SHAPES)}.")
    return shape if args.n_probes is None else shape.with_probes(args.n_probes)
