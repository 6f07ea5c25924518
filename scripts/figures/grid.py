"""Tuned FlashHead against dense decoding: models, precisions, sampling, sequences.

    python scripts/figures/grid.py models/SmolLM2-135M-Instruct models/Gemma-3-270M --json grid.json

Each case runs dense, by mlx-lm's loop and sampler, and with the settings that this machine's tuning
chose, in turns. Where the tuning leaves a model dense, this package's loop runs it densely. The
ratio is that of each turn. A model of 4 bits is made beside the other one, for the time of the run.
"""

import argparse
import itertools
import tempfile
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import mlx_lm

from mlx_flashhead import load
from mlx_flashhead.benchmarks.kinds.model import PROMPT, SAMPLERS, Form, with_flash_head
from mlx_flashhead.benchmarks.report import Case, add_number, add_report_arguments, cells, report
from mlx_flashhead.common.arguments import Parser
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table
from mlx_flashhead.common.timing import spread
from mlx_flashhead.models.install import dense_copy, installed_head

BATCHES = (1, 4)
DENSE, TUNED = "dense", "tuned"


def cases(args: argparse.Namespace) -> Generator[Case]:
    """Each model as it is and in 4 bits, each sampling and number of sequences."""
    for name, bits, model, tokenizer in models(args.models):
        head = installed_head(model)
        forms = {DENSE: Form(dense_copy(model)), TUNED: with_flash_head(model, verify=True)}
        about = {"model": name, "bits": bits, "stays_dense": head.stays_dense, "tuned": head.gain}
        about |= {"n_probes": head.checked_probes, "most_waiting": head.most_waiting}
        prompt = tokenizer.encode(PROMPT)
        for sampler, batch in itertools.product(SAMPLERS, BATCHES):
            run = prompt, batch, args.tokens, SAMPLERS[sampler]
            timers = {name: partial(form.timed, *run) for name, form in forms.items()}
            figures = partial(summary, about | {"sampler": sampler, "batch": batch})
            yield Case(f"{name}, {bits} bits, {sampler}, batch {batch}", timers, figures)


def models(folders: list[Path]) -> Iterator[tuple]:
    """Each model as it is, and in 4 bits: its name, bits, model and tokenizer."""
    for folder in folders:
        model, tokenizer = load(str(folder))
        yield folder.name, installed_head(model).clustered.rows.format.bits, model, tokenizer
        with tempfile.TemporaryDirectory() as place:
            small = Path(place) / folder.name
            mlx_lm.convert(str(folder), str(small), quantize=True, q_bits=4)
            yield folder.name, 4, *load(str(small))


def summary(about: dict, seconds: dict[str, list[float]]) -> dict:
    """Ratios of the turns, and tokens per second of all sequences, JSON-ready."""
    turns = zip(seconds[DENSE], seconds[TUNED], strict=True)
    speeds = {form: about["batch"] / median(times) for form, times in seconds.items()}
    ratio = spread([dense / tuned for dense, tuned in turns])
    return about | {"ratio": ratio, "tokens_per_second": speeds}


def make_table(result: dict):
    """The table of all cases."""
    headings = ("model", "bits", "sampling", "batch", "ratio", "quartiles", "dense", "tuned", "")
    table = new_table("Ratio of each turn, tuned / dense, and tokens/s", headings, left=4)
    for case in result["cases"]:
        table.add_row(
            case["model"],
            f"{case['bits']}",
            case["sampler"],
            f"{case['batch']}",
            *cells(case["ratio"], 3),
            *(f"{speed:.2f}" for speed in case["tokens_per_second"].values()),
            "stays dense" if case["stays_dense"] else "",
        )
    return table


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/grid.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders of models")
    add_number(parser, "--tokens", 24, "Tokens of a run")
    add_report_arguments(parser, rounds=7)
    parser.set_defaults(kind="grid")
    args = parser.parse_args()
    report(
        args,
        cases(args),
        2 * len(args.models) * len(SAMPLERS) * len(BATCHES),
        make_table,
        gather=lambda cases: [{"cases": cases}],
        program="scripts/figures/grid.py",
    )


if __name__ == "__main__":
    main()
