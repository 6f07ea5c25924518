"""Measures a checkpoint on a text, or by the tasks of lm-eval, and prints a table.

Of numbers of probes, beside the paper's routing, or with ``--precisions`` of the bits of the head,
or with ``--tasks`` of the tasks' own metrics.
"""

import json
from pathlib import Path

from .cli.arguments import Parser, whole_number, whole_numbers
from .cli.console import check_writable, command
from .cli.pictures import check_picture, pyplot
from .cli.tables import check_tables, new_table, show
from .conversion.calibration import read_text
from .evaluation.masks import MaskEvaluation, evaluate_masks
from .evaluation.precision import PrecisionEvaluation, evaluate_precisions
from .evaluation.task_options import add_task_options, check_task_options, run_tasks
from .evaluation.text import FLASH_HEAD, Evaluation, evaluate
from .models.load import load

LEGEND = """\
agreement   same best token as the dense head
coverage    the true next token is scored
mass        the dense head's probability of all scored tokens
KL          from the dense head's distribution, in nats
perplexity  relative to dense, with the tail's estimates
drawn       relative to dense, probes drawn by probability as in the paper
bytes       read per token, relative to the dense head
unit means  the paper's routing, here on these clusters; it was made for
            clusters by direction: see convert --calibration none"""
PRECISION_LEGEND = """\
agreement   same best token as the reference: the first line
KL          from the reference's distribution, in nats
perplexity  relative to the reference, with the tail's estimates
MB          read per token
bytes       read per token, relative to a dense head of 16 bits
Only the head's rows differ: 8 and 4 bits are MLX's affine form of the
16-bit rows. All else is the checkpoint's own."""

MASK_LEGEND = """\
Positions in which the best token is the dense head's:
estimates  what the head has not scored is estimated
exact      after the second look of generate and server
random     so many tokens are allowed, drawn each time
near       0.5 nats more or less than a token needs"""


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.evaluate",
        description="Measure how close a FlashHead model comes to its dense head on a text, or "
        "what it reaches in the tasks of lm-eval.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="Folder or Hugging Face repository of a FlashHead checkpoint.",
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on.")
    parser.add_argument(
        "--probes",
        type=whole_numbers(1),
        metavar="48,96,…",
        help="Numbers of clusters scored per token (default: the usual ones and the model's own, "
        "with --precisions or --tasks only the latter).",
    )
    parser.add_argument(
        "--precisions",
        action="store_true",
        help="Compare the head at 16, 8 and 4 bits instead, dense and FlashHead, with the dense "
        "head at full precision.",
    )
    parser.add_argument(
        "--masks",
        action="store_true",
        help="Compare the choices under masks, biases and penalties instead.",
    )
    parser.add_argument(
        "--positions", type=whole_number(1), help="Positions to measure (default: all)."
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        help="Seed of the drawn probes, or of the examples and the sampling of tasks.",
    )
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
    parser.add_argument("--plot", metavar="OUT.png", help="Draw the curves into a picture.")
    add_task_options(parser)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.evaluate``."""
    args = make_parser().parse_args()
    check_task_options(args)
    check_tables("mlx_flashhead.evaluate")
    if args.json:
        check_writable("--json", args.json)
    if args.masks and (args.precisions or args.tasks or args.probes):
        raise ValueError("--masks is by itself: leave --precisions, --tasks and --probes out.")
    if args.plot and (args.precisions or args.masks):
        option = "--precisions" if args.precisions else "--masks"
        raise ValueError(f"--plot draws numbers of probes: leave it out with {option}.")
    if args.plot:
        check_picture("--plot", args.plot)
    if args.tasks:
        run_tasks(args)
        return
    text = read_text(args.text)
    model, tokenizer = load(args.model)
    options = {"probe_counts": args.probes, "positions": args.positions}
    if args.masks:
        masks = evaluate_masks(model, tokenizer, text, positions=args.positions, seed=args.seed)
        print_masks(masks)
        figures = masks.to_dict()
    elif args.precisions:
        precisions = evaluate_precisions(model, tokenizer, text, **options)
        print_precisions(precisions)
        figures = precisions.to_dict()
    else:
        evaluation = evaluate(model, tokenizer, text, seed=args.seed, **options)
        print_table(evaluation)
        if args.plot:
            draw(evaluation, args.plot)
        figures = evaluation.to_dict()
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def print_table(evaluation: Evaluation) -> None:
    """Prints the evaluation as one table, which fits 80 columns."""
    figures = ("probes", "agreement", "coverage", "mass", "KL", "perplexity", "drawn", "bytes")
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_clusters} clusters, "
        f"dense perplexity {evaluation.dense_perplexity:.2f}",
        ("routing", *figures),
        LEGEND,
        padding=(0, 0, 0, 0),
    )
    previous = None
    for measured in evaluation.measures:
        if previous not in (None, measured.routing):
            table.add_section()
        own = measured.routing == FLASH_HEAD and measured.n_probes == evaluation.n_probes
        table.add_row(
            "" if measured.routing == previous else measured.routing,
            f"{measured.n_probes}",
            f"{measured.agreement:.2%}",
            f"{measured.coverage:.2%}",
            f"{measured.covered_mass:.2%}",
            _or_dash(measured.kl, "{:.3f}"),
            _or_dash(measured.perplexity / evaluation.dense_perplexity, "{:.3f}"),
            _or_dash(measured.drawn_perplexity / evaluation.dense_perplexity, "{:.2f}"),
            f"{evaluation.bytes_share[measured.n_probes]:.1%}",
            style="bold" if own else None,
        )
        previous = measured.routing
    show(table)


def print_precisions(evaluation: PrecisionEvaluation) -> None:
    """Prints the forms of the head as one table, which fits 80 columns."""
    reference = evaluation.reference
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_clusters} clusters, perplexity of "
        f"the {reference.bits}-bit dense head {reference.perplexity:.2f}",
        ("head", "bits", "probes", "agreement", "KL", "perplexity", "MB", "bytes"),
        PRECISION_LEGEND,
    )
    previous = (reference.head, reference.n_probes)
    for measured in evaluation.measures:
        kind = (measured.head, measured.n_probes)
        if kind != previous:
            table.add_section()
        table.add_row(
            measured.head,
            f"{measured.bits}",
            "–" if measured.n_probes is None else f"{measured.n_probes}",
            f"{measured.agreement:.2%}",
            f"{measured.kl:.5f}",
            f"{measured.perplexity / reference.perplexity:.4f}",
            f"{measured.bytes_read / 1e6:.2f}",
            f"{measured.bytes_share:.1%}",
        )
        previous = kind
    show(table)


def print_masks(evaluation: MaskEvaluation) -> None:
    """Prints the choices as one table, which fits 80 columns."""
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_probes} probes of "
        f"{evaluation.n_clusters} clusters",
        ("change of the logits", "estimates", "exact", "differing"),
        MASK_LEGEND,
    )
    for choice in evaluation.choices:
        table.add_row(
            choice.change, f"{choice.estimates:.2%}", f"{choice.exact:.2%}", f"{choice.differing}"
        )
    show(table)


def draw(evaluation: Evaluation, path: str) -> None:
    """Draws agreement and coverage over the number of probes into a picture."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (field, title) in zip(
        axes,
        (("agreement", "Agreement with the dense head"), ("coverage", "True next token scored")),
        strict=True,
    ):
        for routing in dict.fromkeys(m.routing for m in evaluation.measures):
            chosen = [m for m in evaluation.measures if m.routing == routing]
            values = [100 * getattr(m, field) for m in chosen]
            axis.plot([m.n_probes for m in chosen], values, marker="o", label=routing)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel=f"clusters scored of {evaluation.n_clusters}", ylabel="%")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _or_dash(value: float, form: str) -> str:
    return "–" if value != value else form.format(value)


if __name__ == "__main__":
    main()
