"""One FlashHead for all precisions of a model: measures each with its own and with that of 16 bits.

    python scripts/precisions.py --model models/SmolLM2-135M-Instruct --text tests/data/heldout.txt

The hidden states are those of the model as it is. Only the rows of its head change: to bfloat16, to
fewer bits, and by noise, as a further training changes them. Each form is compared with the dense
head of the same rows, at the number of probes of the FlashHead of 16 bits, and at each of --probes.
With --flash-head FOLDER that FlashHead is there already, and is not built.
"""

import argparse
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # works uninstalled too

from mlx_flashhead.common.arguments import Parser, whole_number, whole_numbers
from mlx_flashhead.common.command import command
from mlx_flashhead.common.quantities import percent
from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.conversion.calibration import read_text, text_states
from mlx_flashhead.conversion.indexing import build_index
from mlx_flashhead.conversion.measures import Routing, measure
from mlx_flashhead.conversion.mix import mixed_positions
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.index.files import FlashHeadIndex, read_index
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.fetch import resolve
from mlx_flashhead.models.locate import find_head

OWN, SHARED = "its own", "of 16 bits"
SIXTEEN = "bfloat16"
FORMS = {
    SIXTEEN: {},
    "8 bits": {"bits": 8, "group_size": 64},
    "6 bits": {"bits": 6, "group_size": 64},
    "4 bits": {"bits": 4, "group_size": 64},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "3 bits": {"bits": 3, "group_size": 64},
}
NOISE = (0.1, 0.2, 0.3)  # of the rows' standard deviation


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="scripts/precisions.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or repository, in 16 bits or more")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on")
    parser.add_argument("--positions", type=whole_number(1), help="of the text (default: all)")
    parser.add_argument(
        "--calibration-positions", type=whole_number(100), default=12_000, help="of the mix"
    )
    parser.add_argument("--probes", type=whole_numbers(1), default=[], metavar="128,256,…")
    parser.add_argument(
        "--forms",
        type=lambda names: names.split(","),
        metavar="NAME,…",
        help=f"of the rows, besides bfloat16 (default: {', '.join([*FORMS][1:])}, "
        f"{', '.join(f'noise {share}' for share in NOISE)})",
    )
    parser.add_argument(
        "--own",
        type=lambda names: names.split(","),
        metavar="NAME,…",
        help="forms that get a FlashHead of their own too (default: all, with --flash-head none)",
    )
    parser.add_argument(
        "--flash-head", metavar="FOLDER", help="the FlashHead of 16 bits (default: one is built)"
    )
    parser.add_argument(
        "--json", metavar="OUT", help="write the figures to a JSON file, after each form"
    )
    return parser


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    text = read_text(args.text)
    model, tokenizer, _ = load_dense(resolve(args.model))
    location = find_head(model)
    rows = location.rows()
    if rows.quantized:
        raise ValueError(f"{args.model} is quantized: give the model in 16 bits or more.")
    shared = None if args.flash_head is None else read_index(Path(args.flash_head))
    calibration = None
    if args.flash_head is None or args.own:
        calibration = mixed_positions(model, tokenizer, location, args.calibration_positions)
    states, next_ids = text_states(model, tokenizer, location, text, positions=args.positions)
    about = {"model": Path(args.model).name, "positions": len(states)}
    found: list[dict] = []
    for name, form in forms(rows).items():
        if args.forms is not None and name not in (SIXTEEN, *args.forms):
            continue
        own = build_index(form, calibration, progress=False) if has_own(name, args) else None
        shared = shared or own
        assert shared is not None
        found += rows_of_form(name, form, own, shared, states, next_ids, args.probes)
        if args.json:
            Path(args.json).write_text(json.dumps(about | {"figures": found}, indent=2) + "\n")
        print(f"{name}: measured", file=sys.stderr)
    print_figures(found, f"{about['model']}, {len(states):,} positions")


def has_own(name: str, args: argparse.Namespace) -> bool:
    """Whether a form gets a FlashHead of its own."""
    if args.flash_head is None and (name == SIXTEEN or args.own is None):
        return True
    return args.own is not None and name in args.own


def rows_of_form(
    name: str,
    form: Matrix,
    own: FlashHeadIndex | None,
    shared: FlashHeadIndex,
    states: np.ndarray,
    next_ids: np.ndarray,
    probes: list[int],
) -> list[dict]:
    """Figures of one form with its own FlashHead, if it has one, and with the shared one."""
    likeness = shared.sketch.likeness(form)
    found = []
    for whose, index in ((OWN, own), (SHARED, shared)):
        if index is None:
            continue
        for measured in figures(
            index, form, states, next_ids, sorted({*probes, shared.config.n_probes})
        ):
            about = {"rows": name, "flash_head": whose, "cosine": likeness.cosine}
            about["length_change"] = likeness.length_change
            found.append(about | measured)
    return found


def forms(rows: Matrix) -> dict[str, Matrix]:
    """The rows in every form, those of 16 bits first."""
    sixteen = Matrix(rows.weight.astype(mx.bfloat16), bias=rows.bias)
    found = {name: sixteen.quantize(**form) if form else sixteen for name, form in FORMS.items()}
    rng = np.random.default_rng(0)
    weight = np.array(rows.weight.astype(mx.float32))
    for share in NOISE:
        noisy = weight + share * weight.std() * rng.standard_normal(weight.shape, np.float32)
        found[f"noise {share}"] = Matrix(mx.array(noisy).astype(mx.bfloat16), bias=rows.bias)
    return found


def figures(
    index: FlashHeadIndex,
    rows: Matrix,
    states: np.ndarray,
    next_ids: np.ndarray,
    probes: list[int],
) -> list[dict]:
    """Agreement, KL and perplexity relative to the dense head of the same rows."""
    weight = np.array(rows.dequantized(mx.float32))
    bias = 0.0 if rows.bias is None else np.array(rows.bias.astype(mx.float32))
    centroids = index.centroids
    matrix = np.array(centroids.matrix.dequantized(mx.float32))
    offset = np.array(centroids.bias)
    routing = Routing("FlashHead", lambda h: h @ matrix.T + offset, np.array(centroids.tail_offset))
    measured, dense = measure(
        states,
        lambda h: h @ weight.T + bias,
        index.token_ids,
        [routing],
        probes,
        next_ids,
        progress=False,
    )
    return [
        {
            "n_probes": one.n_probes,
            "agreement": one.agreement,
            "kl": one.kl,
            "perplexity": one.perplexity / dense,
        }
        for one in measured
    ]


def print_figures(found: list[dict], title: str) -> None:
    """Prints a line for each form and FlashHead."""
    headings = ("rows", "FlashHead", "cosine", "length", "probes", "agreement", "KL", "perplexity")
    table = new_table(title, headings, left=2)
    for one in found:
        table.add_row(
            one["rows"],
            one["flash_head"],
            f"{one['cosine']:.4f}",
            percent(one["length_change"], 1),
            str(one["n_probes"]),
            percent(one["agreement"]),
            f"{one['kl']:.4f}",
            f"{one['perplexity']:.4f}",
        )
    show(table)


if __name__ == "__main__":
    main()
