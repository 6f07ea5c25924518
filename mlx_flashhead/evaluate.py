"""Measures a checkpoint on a text, or by the tasks of lm-eval, and prints a table.

The table compares numbers of probes and the paper's routing. With ``--precisions`` it compares the
bits of the head, and with ``--tasks`` it shows the tasks' own metrics.
"""

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
from .common.tables import check_tables
from .conversion.calibration import read_text
from .evaluation.answers import evaluate_answers
from .evaluation.masks import evaluate_masks
from .evaluation.output import (
    draw,
    print_answers,
    print_masks,
    print_precisions,
    print_structured,
    print_table,
    print_tasks,
)
from .evaluation.precision import evaluate_precisions
from .evaluation.structured import evaluate_structured
from .evaluation.text import evaluate
from .loading.load import load
from .loading.look_up import add_look_up_options, look_up_options
from .lossless.sampler import make_sampler

EXTRA = "tasks"


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.evaluate",
        description="Measure how close a FlashHead model comes to its dense head on a text, or "
        "its results in the tasks of lm-eval.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="Folder or Hugging Face repository of any model that mlx-lm loads.",
    )
    add_look_up_options(parser)
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
        "--answers",
        action="store_true",
        help="Compare whole greedy answers to 114 requests instead, with half, once and twice the "
        "model's probes (or --probes).",
    )
    parser.add_argument(
        "--structured",
        action="store_true",
        help="Answer requests within JSON schemas instead, greedily and at temperature 1: are they "
        "valid, and the dense model's?",
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
    _add_task_options(parser)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.evaluate``."""
    args = make_parser().parse_args()
    _check_arguments(args)
    check_tables("mlx_flashhead.evaluate")
    if args.json:
        check_writable("--json", args.json)
    if args.plot:
        check_picture("--plot", args.plot)
    if args.tasks:
        _run_tasks(args)
        return
    text = "" if args.answers or args.structured else read_text(args.text)
    model, tokenizer = load(args.model, **look_up_options(args))
    options = {"probe_counts": args.probes, "positions": args.positions}
    if args.answers:
        answers = evaluate_answers(model, tokenizer, probe_counts=args.probes)
        print_answers(answers)
        figures = answers.to_dict()
    elif args.structured:
        structured = evaluate_structured(model, tokenizer, seed=args.seed)
        print_structured(structured)
        figures = structured.to_dict()
    elif args.masks:
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


def _add_task_options(parser: argparse.ArgumentParser) -> None:
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
        "--output-dir",
        metavar="FOLDER",
        help="Write the figures into a file in this folder, of the name and the form of "
        "mlx_lm.evaluate's.",
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


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises before any work begins if arguments contradict each other."""
    if not args.tasks:
        if args.output_dir:
            raise ValueError("--output-dir is for --tasks: write other figures with --json.")
        if args.answers or args.structured:
            option = "answers" if args.answers else "structured"
            others = ["answers", "text", "precisions", "masks", "positions", "plot", "structured"]
            others += [] if args.answers else ["probes"]
            beside = [other for other in others if other != option and getattr(args, other)]
            if beside:
                raise ValueError(f"--{option} is by itself: leave --{beside[0]} out.")
            return
        if not args.text:
            raise ValueError(
                "Give --text FILE to measure on a text, --answers, --structured, or --tasks TASK "
                "for lm-eval's."
            )
        if args.masks and (args.precisions or args.probes):
            raise ValueError("--masks goes alone: leave --precisions and --probes out.")
        if args.plot and (args.precisions or args.masks):
            option = "--precisions" if args.precisions else "--masks"
            raise ValueError(f"--plot draws numbers of probes: leave it out with {option}.")
        return
    for option, given in (
        ("--text", args.text),
        ("--precisions", args.precisions),
        ("--masks", args.masks),
        ("--answers", args.answers),
        ("--structured", args.structured),
        ("--positions", args.positions),
        ("--plot", args.plot),
    ):
        if given:
            raise ValueError(f"{option} measures on a text: leave it out with --tasks.")
    if args.probes and len(args.probes) > 1:
        raise ValueError("--tasks are run with one number of clusters: give --probes one number.")


def _run_tasks(args: argparse.Namespace) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # lm-eval starts processes
    from_extra("lm_eval", EXTRA, "--tasks")
    from .evaluation.tasks import by_task, evaluate_tasks, find_tasks, results_file

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
        n_probes=args.probes[0] if args.probes else None,
        **look_up_options(args),
    )
    with redirect_stdout(sys.stderr):  # where mlx-lm prints its progress
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
    if output is not None:
        output.write_text(json.dumps(by_task(measures), indent=4))


if __name__ == "__main__":
    main()
