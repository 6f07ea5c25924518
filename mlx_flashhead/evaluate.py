"""Measures how close a FlashHead comes to the dense head of its model."""

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx

from .common.arguments import LIMITS, Parser, json_object, whole_number, whole_numbers
from .common.command import check_writable, command
from .common.extras import from_extra, installation
from .common.pictures import check_picture
from .common.tables import check_tables, show
from .conversion.calibration import read_text
from .evaluation import answers, text
from .loading.load import load
from .loading.look_up import add_look_up_options, look_up_options
from .lossless.sampler import make_sampler

EXTRA = "tasks"


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(prog="mlx_flashhead.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    _add_text(commands)
    _add_answers(commands)
    _add_tasks(commands)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.evaluate``."""
    args = make_parser().parse_args()
    check_tables("mlx_flashhead.evaluate")
    if args.json:
        check_writable("--json", args.json)
    figures = args.run(args)
    if args.json and figures is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def _add_text(commands) -> None:
    parser = _add_command(
        commands,
        "text",
        _run_text,
        "measure on a text",
        "Measure on a text: agreement with the dense head, KL, perplexity and bytes, by the number "
        "of clusters scored.",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on.")
    _add_probes(parser, "the usual ones and the model's own")
    parser.add_argument(
        "--positions", type=whole_number(1), help="Positions to measure (default: all)."
    )
    parser.add_argument("--plot", metavar="OUT.png", help="Draw the curves into a picture.")


def _run_text(args: argparse.Namespace) -> dict:
    if args.plot:
        check_picture("--plot", args.plot)
    content = read_text(args.text)
    model, tokenizer = load(args.model, **look_up_options(args))
    evaluation = text.evaluate(
        model, tokenizer, content, probe_counts=args.probes, positions=args.positions
    )
    show(text.make_table(evaluation))
    if args.plot:
        text.draw(evaluation, args.plot)
    return evaluation.to_dict()


def _add_answers(commands) -> None:
    parser = _add_command(
        commands,
        "answers",
        _run_answers,
        "compare whole answers",
        "Compare whole greedy answers to 114 requests with the dense model's.",
    )
    _add_probes(parser, "half, once and twice the model's own")


def _run_answers(args: argparse.Namespace) -> dict:
    model, tokenizer = load(args.model, **look_up_options(args))
    evaluation = answers.evaluate_answers(model, tokenizer, probe_counts=args.probes)
    show(answers.make_table(evaluation))
    return evaluation.to_dict()


def _add_tasks(commands) -> None:
    parser = _add_command(
        commands,
        "tasks",
        _run_tasks,
        "run tasks of lm-eval",
        "Run tasks of lm-eval: log-likelihoods under the dense head, generated text with "
        f"FlashHead, perplexities both ways. They need {installation(EXTRA)}.",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        required=True,
        metavar="TASK",
        help="Tasks or groups of tasks, separated by commas or spaces.",
    )
    parser.add_argument(
        "--include-path", metavar="FOLDER", help="Folder with further tasks, as YAML files."
    )
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="Write the figures into a file in this folder, of the name and the form of "
        "mlx_lm.evaluate's.",
    )
    parser.add_argument(
        "--n-probes", type=whole_number(1), help="Clusters scored (default: the model's own)."
    )
    parser.add_argument(
        "--num-shots", type=whole_number(0), help="Worked examples before each question."
    )
    parser.add_argument("--limit", type=whole_number(1), help="Questions per task at most.")
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=8, help="Sequences at once (default: 8)."
    )
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1),
        help="Tokens to generate at most, instead of the task's own limit.",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="Seed of the examples and the sampling."
    )
    parser.add_argument(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the worked examples as turns of a conversation.",
    )
    parser.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Put prompts into the chat template (default: if the model has one).",
    )
    parser.add_argument(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="Arguments of the chat template, such as '{\"enable_thinking\":false}'.",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Run tasks that execute code which the model has written.",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Allow the model's own Python code."
    )
    parser.add_argument(
        "--temp", type=LIMITS["temp"], default=0.0, help="Sampling temperature (default: 0)."
    )
    parser.add_argument("--top-p", type=LIMITS["top_p"], default=1.0, help="Sampling top-p.")
    parser.add_argument("--top-k", type=LIMITS["top_k"], default=0, help="Sampling top-k.")


def _run_tasks(args: argparse.Namespace) -> dict | None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # lm-eval starts processes
    from_extra("lm_eval", EXTRA, "mlx_flashhead.evaluate tasks")
    from .evaluation import tasks

    names = [name for given in args.tasks for name in given.split(",") if name]
    output = None
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        output = tasks.results_file(args.output_dir, args.model, names, args.num_shots)
        check_writable("--output-dir", str(output))
    manager = tasks.find_tasks(names, args.include_path)
    model, tokenizer = load(
        args.model,
        tokenizer_config={"trust_remote_code": True} if args.trust_remote_code else None,
        trust_remote_code=args.trust_remote_code,
        n_probes=args.n_probes,
        **look_up_options(args),
    )
    with redirect_stdout(sys.stderr):  # where mlx-lm prints its progress
        measures = tasks.evaluate_tasks(
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
        return None  # mlx-lm's adapter has shared the questions out and gathered the answers
    show(tasks.make_table(measures))
    if output is not None:
        output.write_text(json.dumps(tasks.by_task(measures), indent=4))
    return {"model": args.model, "results": [measure.to_dict() for measure in measures]}


def _add_command(commands, name: str, run, help: str, description: str) -> argparse.ArgumentParser:
    """A subcommand, with the arguments that all of them have."""
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model",
        required=True,
        help="Folder or Hugging Face repository of any model that mlx-lm loads.",
    )
    add_look_up_options(parser)
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
    return parser


def _add_probes(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--probes",
        type=whole_numbers(1),
        metavar="48,96,…",
        help=f"Numbers of clusters scored per token (default: {default}).",
    )


if __name__ == "__main__":
    main()
