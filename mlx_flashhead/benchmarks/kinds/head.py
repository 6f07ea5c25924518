"""Times a head alone: dense, and FlashHead to a proposed token and to full logits."""

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...common.tables import Table, new_table
from ...common.timing import ColdCaches, Spread, in_turns, timer
from ...conversion.options import HEAD_BITS
from ...head.flash_head import FlashHead
from ...loading.load import load
from ...loading.look_up import add_look_up_options, look_up_options
from ...models.install import installed_head
from ..random_head import random_head
from ..report import ANY_MODEL, Bars, add_number, add_report_arguments, cells, report
from ..rounds import Case, Round, time_cases
from ..shapes import SHAPES

DTYPES = ("float32", "float16", "bfloat16")
N_STATES = 16  # used in turn, and calls of a chain, see `chained`

DENSE, OWN_DENSE = "dense (mlx-lm)", "dense (FlashHead's)"
DENSE_FORMS = (DENSE, OWN_DENSE)
PROPOSAL, LOGITS = "FlashHead proposal", "FlashHead full logits"

TITLE = (
    "{name}: V={vocab_size:,} D={hidden_size:,}, {head_bits}-bit rows, {dtype}, {n_probes:,} of "
    "{n_clusters:,} clusters, batch {positions}"
)
READS = "Reads {read_mb:.1f} MB of weights, dense {head_mb:.1f} MB; cold caches."

Form = Callable[[mx.array], Any]  # a way to use a head: arrays of hidden states (R, D)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this kind."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="NAME|V,D",
        help=f"Random weights of the shape {', '.join(SHAPES)} or V,D; may be given several times.",
    )
    what.add_argument("--model", help=ANY_MODEL)
    add_look_up_options(parser)
    add_number(parser, "--n-probes", None, "Clusters scored (default: 256, or the model's own).")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of random weights.")
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=HEAD_BITS,
        default=16,
        help="Bits of random rows; 16 leaves them in --dtype (default: %(default)s).",
    )
    add_number(parser, "--positions", 1, "Hidden states at once")
    add_report_arguments(parser, rounds=20)


def run(args: argparse.Namespace) -> None:
    """Times the heads of the command line."""
    report(args, measure(args), make_table, bars)


def measure(args: argparse.Namespace) -> Iterator[Round]:
    """Times one head after the other, all forms of it in turns and with cold caches."""
    cases = (_case(args, *described) for described in _heads(args))
    yield from time_cases(cases, len(args.shape or [args.model]), args.rounds)


def _case(args: argparse.Namespace, name: str, head: FlashHead, dtype: mx.Dtype) -> Case:
    cold, named = ColdCaches(), forms(head, args.positions)
    states = mx.random.normal((N_STATES, args.positions, head.hidden_size)).astype(dtype)
    mx.eval(states)

    def call(run: Form, number: int) -> Any:
        return run(states[number % N_STATES])

    timers = {form: timer(partial(call, run), before=cold) for form, run in named.items()}
    on_cpu = mx.default_device().type == mx.cpu
    alone = {} if on_cpu else chained(named, states, args.rounds)

    def figures(seconds: dict[str, list[float]]) -> dict:
        return summary(name, head, dtype, args.positions, seconds) | alone

    return Case(name, timers, figures)


def forms(head: FlashHead, n_positions: int = 1) -> dict[str, Form]:
    """The ways to use a head, by name: functions of hidden states (R, D).

    mlx-lm's dense form has the rows in the FlashHead's order, which does not change its time. The
    FlashHead's dense path may be faster, since it lays the rows out for the CPU. It retrieves from
    the clusters of its proposals, at any number of positions.
    """
    rows = head.clustered.flat_rows().map(lambda array: array[: head.vocab_size])
    mx.eval(rows.arrays())
    retrieving = head.copy()
    retrieving.max_positions, retrieving.n_probes = n_positions, head.checked_probes
    return {
        DENSE: rows.matmul,
        OWN_DENSE: head.dense_logits,
        PROPOSAL: lambda hidden: retrieving.propose(hidden, None).tokens,
        LOGITS: retrieving,
    }


def summary(name: str, head: FlashHead, dtype: mx.Dtype, n_positions: int, seconds: dict) -> dict:
    """Shapes, milliseconds and ratios of the medians, JSON-ready."""
    spreads = {name: Spread.of(times, 1000) for name, times in seconds.items()}
    best_dense = min(DENSE_FORMS, key=lambda name: spreads[name].median)
    rows = head.clustered.rows
    return {
        "name": name,
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "n_clusters": head.n_clusters,
        "cluster_size": head.cluster_size,
        "n_probes": head.checked_probes,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "head_bits": rows.format.bits,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "positions": n_positions,
        "head_mb": rows.nbytes / 1e6,
        "read_mb": read_mb(head, n_positions),
        "best_dense": best_dense,
        "ms": {name: spread.to_dict() for name, spread in spreads.items()},
        "times_faster": {
            f"{name} against {dense}": spreads[dense].median / spreads[name].median
            for dense in dict.fromkeys((DENSE, best_dense))
            for name in (PROPOSAL, LOGITS)
        },
    }


def read_mb(head: FlashHead, n_positions: int = 1) -> float:
    """Megabytes of weights that a call reads on this device if no two states share a cluster."""
    stage_1 = head.clustered.centroids.matrix.nbytes
    if mx.default_device().type == mx.cpu:  # the centroids are float32 there
        stage_1 = 4 * head.n_clusters * head.hidden_size
    rows = head.clustered.rows.nbytes
    probed = min(n_positions * head.checked_probes, head.n_clusters)
    return (stage_1 + rows * probed / head.n_clusters) / 1e6


def chained(named: dict[str, Form], states: mx.array, rounds: int) -> dict[str, dict]:
    """``gpu_ms``: milliseconds of a call within one submission to the GPU, without the host's time.

    Each call's hidden state depends on the result of the call before. The median cost of this
    dependence is timed too, and subtracted. Caches are warm: weights that fit into the last one
    come from it.
    """

    def chain(form: Form, _: int) -> mx.array:
        link = mx.zeros((), states.dtype)
        for hidden in states:
            output = form(hidden + 0 * link)
            output = output[-1] if isinstance(output, tuple) else output
            link = output.reshape(-1)[0].astype(hidden.dtype)
        return link

    nothing = "nothing"
    timers = {
        name: timer(partial(chain, form))
        for name, form in {nothing: lambda hidden: hidden, **named}.items()
    }
    *_, seconds = in_turns(timers, rounds)
    alone = np.median(seconds.pop(nothing))
    ms = {name: 1000 / len(states) * (np.array(times) - alone) for name, times in seconds.items()}
    return {"gpu_ms": {name: Spread.of(each.clip(0)).to_dict() for name, each in ms.items()}}


def make_table(head: dict) -> Table:
    """The table of one head."""
    table = new_table(
        TITLE.format(**head),
        ("", "ms", "quartiles", "vs mlx-lm", "vs best dense"),
        READS.format(**head),
    )
    for name, ms in head["ms"].items():
        ratios = ["", ""]
        if name not in DENSE_FORMS:
            pairs = (f"{name} against {dense}" for dense in (DENSE, head["best_dense"]))
            ratios = [f"{head['times_faster'][pair]:.1f} x" for pair in pairs]
        table.add_row(name, *cells(ms), *ratios)
    for name, ms in head.get("gpu_ms", {}).items():
        table.add_row(f"{name}, GPU alone", *cells(ms, 3))
    return table


def bars(head: dict) -> Bars:
    """The milliseconds of one head."""
    title = f"{head['name']}, {head['dtype']}"
    return title, "ms per call", {name: ms["median"] for name, ms in head["ms"].items()}


def _heads(args: argparse.Namespace) -> Iterator[tuple[str, FlashHead, mx.Dtype]]:
    """Yields the heads of the command line: name, head, and the dtype of its hidden states."""
    if args.model is not None:
        model, _ = load(args.model, n_probes=args.n_probes, **look_up_options(args))
        head = installed_head(model)
        rows = head.clustered.rows
        values = rows.weight if rows.scales is None else rows.scales
        yield Path(args.model).name, head, values.dtype
        return
    dtype = getattr(mx, args.dtype)
    form = {"n_probes": args.n_probes, "dtype": dtype, "bits": args.head_bits}
    for name, sizes in args.shape:
        yield name, random_head(*sizes, **form), dtype


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    """ "qwen3-0.6b" or "151936,1024" → its name and (V, D)."""
    if (name := text.lower()) in SHAPES:
        return name, (SHAPES[name].vocab_size, SHAPES[name].hidden_size)
    if re.fullmatch(r"\s*0*[1-9]\d*\s*,\s*0*[1-9]\d*\s*", text):
        return text, tuple(map(int, text.split(",")))
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a shape: give {', '.join(SHAPES)}, or V,D such as 32000,512"
    )
