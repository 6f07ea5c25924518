"""Tasks of lm-eval, which is an extra: the command line and the table."""

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx

from ..common.arguments import LIMITS, json_object, whole_number
from ..common.command import check_writable, from_extra, installation
from ..common.head_flags import source_options
from ..common.tables import Table, new_table, show
from ..loading.load import load

EXTRA = "tasks"
HELP = "run tasks of lm-eval"
DESCRIPTION = (
    "Run tasks of lm-eval: log-likelihoods under the dense head, generated text with FlashHead, "
    f"perplexities both ways. They need {installation(EXTRA)}."
)
LEGEND = """\
dense       log-likelihoods and perplexities under the dense head
FlashHead   generated text, each token checked; perplexities with its estimates
            for tokens that are not scored, an approximation of the dense ones
±           standard error, where lm-eval has one"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        action="extend",
        required=True,
        metavar="TASK",
        help="Tasks or groups of tasks, separated by commas or spaces.",
    )
    add("--include-path", metavar="FOLDER", help="Folder with further tasks, as YAML files.")
    add(
        "--output-dir",
        metavar="FOLDER",
        help="Write the figures into a file in this folder, of the name and the form of "
        "mlx_lm.evaluate's.",
    )
    at_least = {0: whole_number(0), 1: whole_number(1)}
    add("--n-probes", type=at_least[1], help="Clusters scored (default: the model's own).")
    add("--num-shots", type=at_least[0], help="Worked examples before each question.")
    add("--limit", type=at_least[1], help="Questions per task at most.")
    add("--batch-size", type=at_least[1], default=8, help="Sequences at once (default: 8).")
    add(
        "--max-tokens",
        type=at_least[1],
        help="Tokens to generate at most, instead of the task's own limit.",
    )
    add("--seed", type=at_least[0], default=0, help="Seed of the examples and the sampling.")
    add(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the worked examples as turns of a conversation.",
    )
    add(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Put prompts into the chat template (default: if the model has one).",
    )
    add(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="Arguments of the chat template, such as '{\"enable_thinking\":false}'.",
    )
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Run tasks that execute code which the model has written.",
    )
    add("--trust-remote-code", action="store_true", help="Allow the model's own Python code.")
    add("--temp", type=LIMITS["temp"], default=0.0, help="Sampling temperature (default: 0).")
    add("--top-p", type=LIMITS["top_p"], default=1.0, help="Sampling top-p.")
    add("--top-k", type=LIMITS["top_k"], default=0, help="Sampling top-k.")


def run(args: argparse.Namespace) -> dict | None:
    """Runs the tasks of the command line; None in all processes but the first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # lm-eval starts processes
    from_extra("lm_eval", EXTRA, "mlx_flashhead.evaluate tasks")
    from .lm_eval_tasks import by_task, evaluate_tasks, find_tasks, results_file

    names = [name for given in args.tasks for name in given.split(",") if name]
    output = None
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        output = results_file(args.output_dir, args.model, names, args.num_shots)
        check_writable("--output-dir", str(output))
    manager = find_tasks(names, args.include_path)
    model, tokenizer = load(
        args.model,
        tokenizer_config={"trust_remote_code": True} if args.trust_remote_code else None,
        trust_remote_code=args.trust_remote_code,
        n_probes=args.n_probes,
        **source_options(args),
    )
    with redirect_stdout(sys.stderr):  # where mlx-lm prints its progress
        measures = evaluate_tasks(model, tokenizer, names, manager, args)
    if mx.distributed.init().rank() > 0:
        return None  # mlx-lm's adapter has shared the questions out and gathered the answers
    show(make_table(measures))
    if output is not None:
        output.write_text(json.dumps(by_task(measures), indent=4))
    return {"model": args.model, "results": measures}


def make_table(measures: list[dict]) -> Table:
    """A line for each task, metric and head."""
    table = new_table(
        None, ("task", "head", "metric", "shots", "samples", "value", "±"), LEGEND, left=3
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # some names are long
    previous = None
    for one in sorted(measures, key=lambda m: (m["task"], m["metric"], m["filter"])):
        task, metric = one["task"], one["metric"]
        if previous not in (None, task):
            table.add_section()
        table.add_row(
            "" if task == previous else task,
            one["head"],
            metric if one["filter"] == "none" else f"{metric} ({one['filter']})",
            *("–" if one[key] is None else str(one[key]) for key in ("n_shots", "samples")),
            *("–" if one[key] is None else f"{one[key]:.4f}" for key in ("value", "stderr")),
        )
        previous = task
    return table
