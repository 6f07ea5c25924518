"""``evaluate --tasks``: the tasks of lm-eval, with the flags of ``mlx_lm.evaluate``."""

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx

from ..cli.arguments import LIMITS, json_object, whole_number
from ..cli.extras import from_extra, installation
from ..cli.tables import new_table, show
from ..models.load import load
from ..models.sampling import make_sampler

LEGEND = """\
dense       log-likelihoods and perplexities under the dense head
FlashHead   generated text; perplexities with its estimates for tokens
            that were not scored, an approximation of the dense ones
±           standard error, where lm-eval has one"""
EXTRA = "tasks"


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--tasks`` and what goes with it."""
    group = parser.add_argument_group(
        "tasks of lm-eval",
        f"Log-likelihoods under the dense head, generated text with FlashHead, perplexities both "
        f"ways. They need {installation(EXTRA)}.",
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        metavar="TASK",
        help="Tasks or groups of tasks, separated by commas or spaces, instead of --text.",
    )
    group.add_argument(
        "--include-path", metavar="FOLDER", help="Folder with further tasks, as YAML files."
    )
    group.add_argument(
        "--num-shots", type=whole_number(0), help="Worked examples before each question."
    )
    group.add_argument("--limit", type=whole_number(1), help="Questions per task at most.")
    group.add_argument(
        "--batch-size", type=whole_number(1), default=8, help="Sequences at once (default: 8)."
    )
    group.add_argument(
        "--max-tokens",
        type=whole_number(1),
        help="Tokens to generate at most, instead of the task's own limit.",
    )
    group.add_argument(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the worked examples as turns of a conversation.",
    )
    group.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Put prompts into the chat template (default: if the model has one).",
    )
    group.add_argument(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="Arguments of the chat template, such as '{\"enable_thinking\":false}'.",
    )
    group.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Run tasks that execute code which the model has written.",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="Allow the model's own Python code."
    )
    group.add_argument(
        "--temp", type=LIMITS["temp"], default=0.0, help="Sampling temperature (default: 0)."
    )
    group.add_argument("--top-p", type=LIMITS["top_p"], default=1.0, help="Sampling top-p.")
    group.add_argument("--top-k", type=LIMITS["top_k"], default=0, help="Sampling top-k.")


def check_task_options(args: argparse.Namespace) -> None:
    """Makes sure, before any work, that the arguments go together.

    Raises:
        ValueError: If they do not.
    """
    if not args.tasks:
        if not args.text:
            raise ValueError(
                "Give --text FILE to measure on a text, or --tasks TASK for lm-eval's."
            )
        return
    for option, given in (
        ("--text", args.text),
        ("--precisions", args.precisions),
        ("--positions", args.positions),
        ("--plot", args.plot),
    ):
        if given:
            raise ValueError(f"{option} is about a text: leave it out with --tasks.")
    if args.probes and len(args.probes) > 1:
        raise ValueError("--tasks are run with one number of clusters: give --probes one number.")


def run_tasks(args: argparse.Namespace) -> None:
    """Runs the tasks, prints their table, and writes the figures where that is asked for.

    Raises:
        ValueError: If lm-eval is not installed, there is no such task, or one cannot be run.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # lm-eval starts processes
    from_extra("lm_eval", EXTRA, "--tasks")
    from .tasks import evaluate_tasks, find_tasks

    names = [name for given in args.tasks for name in given.split(",") if name]
    manager = find_tasks(names, args.include_path)
    model, tokenizer = load(
        args.model,
        tokenizer_config={"trust_remote_code": True} if args.trust_remote_code else None,
        trust_remote_code=args.trust_remote_code,
        n_probes=args.probes[0] if args.probes else None,
    )
    with redirect_stdout(sys.stderr):  # mlx-lm tells its progress
        measures = evaluate_tasks(
            model,
            tokenizer,
            names,
            manager,
            num_shots=args.num_shots,
            limit=args.limit,
            seed=args.seed,
            fewshot_as_multiturn=args.fewshot_as_multiturn,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            use_chat_template=args.apply_chat_template,
            chat_template_args=args.chat_template_args,
            sampler=make_sampler(temp=args.temp, top_p=args.top_p, top_k=args.top_k),
        )
    if mx.distributed.init().rank() > 0:
        return  # mlx-lm's adapter has shared the questions out and gathered the answers
    print_tasks(measures)
    if args.json:
        figures = {"model": args.model, "results": [measure.to_dict() for measure in measures]}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def print_tasks(measures: list) -> None:
    """Prints the tasks' metrics as one table."""
    table = new_table(
        None, ("task", "head", "metric", "shots", "samples", "value", "±"), LEGEND, left=3
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # some names are long
    previous = None
    for measured in sorted(measures, key=lambda m: (m.task, m.metric, m.filter)):
        if previous not in (None, measured.task):
            table.add_section()
        named = measured.filter != "none"
        table.add_row(
            "" if measured.task == previous else measured.task,
            measured.head,
            f"{measured.metric} ({measured.filter})" if named else measured.metric,
            _or_dash(measured.n_shots, "d"),
            _or_dash(measured.samples, "d"),
            f"{measured.value:.4f}",
            _or_dash(measured.stderr, ".4f"),
        )
        previous = measured.task
    show(table)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
