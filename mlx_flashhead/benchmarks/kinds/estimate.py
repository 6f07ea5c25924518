"""An estimate of a decode step's time on an Apple chip, from bytes and kernels."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ...common.arguments import whole_number
from ...common.command import check_writable
from ...common.tables import new_table, show
from ...loading import cache
from ...loading.look_up import HeadOptions, head_beside
from ...models.dense import load_dense
from ...models.fetch import resolve
from ...models.locate import find_head
from ..apple_gpu import CONSTANTS, PEAK_GB_S, bandwidth
from ..roofline import (
    SHAPES,
    Estimate,
    ModelShape,
    checked_measurements,
    estimates,
    formula,
    model_shape,
)

NOTE = (
    "AN ESTIMATE, NOT A MEASUREMENT: no Apple GPU was used. One sequence, greedy, short context. "
    "Its error shows in this table of public figures of mlx-lm (4-bit, dense)."
)


HELP = "estimate the time per token on an Apple chip"
DESCRIPTION = (
    "Estimate milliseconds per token of head and model on an Apple chip, from bytes and kernels, "
    "beside public measurements. Nothing is run."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this kind."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", help="Folder or Hugging Face repository of any model that mlx-lm loads."
    )
    what.add_argument("--shape", help=f"A known shape: {', '.join(SHAPES)}.")
    parser.add_argument("--chip", required=True, help=f"One of {', '.join(PEAK_GB_S)}.")
    parser.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored per token (default: those of the model's FlashHead, in its folder or "
        "kept from before, else 256).",
    )
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")


def run(args: argparse.Namespace) -> None:
    """Prints the estimate, and writes it to the file of ``--json``.

    Raises:
        ValueError: If an argument is not valid, or the model cannot be loaded or estimated.
    """
    chip = args.chip.strip().lower().replace(" ", "-")
    bandwidth(chip)  # refuses an unknown chip before a model is loaded
    if args.json:
        check_writable("--json", args.json)
    shape = _shape(args)
    found = list(estimates(shape, chip))
    print_estimates(shape, chip, found)
    if args.json:
        report = to_dict(shape, chip, found)
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def to_dict(shape: ModelShape, chip: str, found: list[Estimate]) -> dict:
    """JSON-ready, marked as an estimate."""
    return {
        "kind": "estimate",
        "measured": False,
        "chip": chip,
        "peak_gb_s": PEAK_GB_S[chip],
        "bandwidth_gb_s": bandwidth(chip),
        "constants": {name: {"value": v, "source": s} for name, (v, s) in CONSTANTS.items()},
        "formula": formula(shape).splitlines(),
        "model": asdict(shape),
        "estimates": [asdict(estimate) for estimate in found],
        "public_measurements": [
            asdict(public) | {"measured_ms": measured, "estimated_ms": estimated, "error": error}
            for public, measured, estimated, error in checked_measurements()
        ],
    }


def print_estimates(shape: ModelShape, chip: str, found: list[Estimate]) -> None:
    """Prints the forms, the formula, its constants, and the public measurements: 80 columns."""
    table = new_table(
        f"ESTIMATE: {shape.name} on {chip}, ms per token",
        ("body", "head rows", "head", "head MB", "head ms", "model ms", "tokens/s", "gain"),
        left=3,
    )
    for dense, flash in zip(found[::2], found[1::2], strict=True):
        for one in (dense, flash):
            table.add_row(
                *((one.body, one.rows) if one is dense else ("", "")),
                one.form,
                f"{one.head_mb:.1f}",
                f"{one.head_ms:.3f}",
                f"{one.model_ms:.2f}",
                f"{1000 / one.model_ms:.0f}",
                "" if one is dense else f"{dense.model_ms / one.model_ms:.2f}x",
            )
        table.add_section()
    constants = [
        f"bandwidth  {bandwidth(chip):.0f} GB/s, of a peak of {PEAK_GB_S[chip]} by Apple",
        *(f"{name:10} {value:.3g} {source}" for name, (value, source) in CONSTANTS.items()),
    ]
    public_table = new_table(
        None, ("public measurement", "tokens/s", "measured ms", "estimated ms", "error")
    )
    for public, measured, estimated, error in checked_measurements():
        public_table.add_row(
            f"{public.model} on {public.chip}",
            f"{public.tokens_per_second:g}",
            f"{measured:.2f}",
            f"{estimated:.2f}",
            f"{100 * error:+.0f} %",
        )
    show(table, formula(shape), "", *constants, "", NOTE, public_table)


def _shape(args: argparse.Namespace) -> ModelShape:
    if args.model is not None:
        folder = resolve(args.model)
        model, _, _ = load_dense(folder, lazy=True)
        options = HeadOptions()
        stored = head_beside(folder, options) or cache.find(find_head(model).rows(), options.say)
        shape = model_shape(folder.name, model, None if stored is None else stored.index)
    elif args.shape in SHAPES:
        shape = SHAPES[args.shape]
    else:
        raise ValueError(f"There is no shape {args.shape!r}: choose one of {', '.join(SHAPES)}.")
    return shape if args.n_probes is None else shape.with_probes(args.n_probes)
