"""Puts three servers under load, in turns: with FlashHead, dense, and mlx-lm's own.

Every server has a process of its own, and none of them keeps caches of prompts, so that each prompt
is read. Clients stream answers to prompts of different lengths. Some hang up after the first text.
The other answers are compared with those to the same questions alone.
"""

import argparse
import math
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from statistics import median

from ...common.arguments import whole_numbers
from ...common.tables import Table, new_table
from ...common.timing import spread
from ...models.fetch import resolve
from ..clients import Reply, ask, serving
from ..report import Case, add_model_arguments, add_number, add_report_arguments, report

FLASH_HEAD, DENSE, MLX_LM = "FlashHead", "dense", "mlx_lm.server"
CLIENTS = (1, 4, 8, 16)
TOPICS = ("the moon", "bread", "rivers", "the number seven", "bees", "glass", "winter", "trains")
SENTENCE = "The bridge over the river was old and narrow, and nobody knew who had built it. "
# Sentences before a question. Prompts of different lengths must not hold each other up.
LENGTHS = (0, 4, 1, 0, 2, 0, 8, 1)
# Of so many clients in succession one hangs up.
HANGS_UP = 5
_MAX_PROBLEMS = 5
Answered = tuple[str, Reply | str]  # a question with its reply, or with what was wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this kind."""
    add_model_arguments(parser)
    parser.add_argument(
        "--clients",
        type=whole_numbers(1),
        default=CLIENTS,
        metavar="1,4,…",
        help=f"Numbers of clients at once (default: {','.join(map(str, CLIENTS))}).",
    )
    add_number(parser, "--requests", 16, "Requests to a server for each number of clients")
    add_number(parser, "--tokens", 16, "Tokens of each answer")
    add_report_arguments(parser, rounds=1)


def run(args: argparse.Namespace) -> None:
    """Puts the servers of the command line's model under load."""
    folder = resolve(args.model)
    about = {"model": folder.name, "requests": args.requests, "tokens": args.tokens}
    report(
        args,
        _cases(args, str(folder)),
        len(args.clients),
        make_table,
        gather=lambda cases: [
            about | {"loads": [load for case in cases for load in case["loads"]]}
        ],
    )


def _cases(args: argparse.Namespace, folder: str) -> Generator[Case]:
    """Each number of clients."""
    model = ("--model", folder, "--prompt-cache-size", "0")
    flags = ["--n-probes", str(args.n_probes)] if args.n_probes is not None else []
    flags += ["--flash-head", args.flash_head] if args.flash_head is not None else []
    # neither the build nor dense steps are to be measured
    flags += ["--no-build" if args.no_build else "--build-first", "--flash-head-always"]
    commands = {
        FLASH_HEAD: ("mlx_flashhead.server", *model, *flags),
        DENSE: ("mlx_flashhead.server", *model, "--dense"),
        MLX_LM: ("mlx_lm.server", *model),
    }
    print("Three servers start, and answer each question alone.", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        ports = {name: stack.enter_context(serving(*each)) for name, each in commands.items()}
        alone = {
            name: {q: ask(port, q, max_tokens=args.tokens).text for q in questions()}
            for name, port in ports.items()
        }
        for n in args.clients:
            replies: dict[str, list[Answered]] = {name: [] for name in ports}
            timers = {
                name: partial(visit, port, n, args.requests, args.tokens, replies[name])
                for name, port in ports.items()
            }
            yield Case(f"{n} at once, per token", timers, partial(_loads, n, replies, alone))


def visit(
    port: int, clients: int, requests: int, tokens: int, replies: list[Answered], number: int
) -> float:
    """A round of one server: several clients at once, each with one question after the other.

    Returns the seconds for a token of all clients, and adds to ``replies``.
    """
    if number == 0:
        return 0.0  # the questions alone have warmed it up
    asked = questions()

    def request(i: int) -> Answered:
        question, leaves = asked[i % len(asked)], i % HANGS_UP == HANGS_UP - 1
        try:
            return question, ask(port, question, max_tokens=tokens, hang_up=leaves)
        except (OSError, ValueError) as error:
            return question, f"{question[-40:]!r}: {error}"[:300]

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        of_round = list(pool.map(request, range(requests)))
    seconds = time.monotonic() - began
    replies += of_round
    n_tokens = sum(reply.n_tokens or 0 for _, reply in of_round if isinstance(reply, Reply))
    return seconds / n_tokens if n_tokens else math.inf


def _loads(n: int, replies: dict, alone: dict, seconds: dict) -> dict:
    each = {name: figures(replies[name], alone[name], seconds[name]) for name in replies}
    return {"loads": [{"clients": n, "server": name} | load for name, load in each.items()]}


def figures(pairs: list[Answered], alone: dict[str, str], seconds: list[float]) -> dict:
    """Of one server with one number of clients, with the text that each question has alone.

    Complete answers are ``as_alone``, or ``anothers`` with the text of another question.
    """
    replies = [(question, reply) for question, reply in pairs if isinstance(reply, Reply)]
    problems = [reply for _, reply in pairs if isinstance(reply, str)]
    texts = [(question, reply.text) for question, reply in replies if reply.n_tokens is not None]
    as_alone = sum(text == alone[question] for question, text in texts)
    first = [reply.first_seconds for _, reply in replies if reply.first_seconds is not None]
    return {
        "answered": len(texts),
        "hung_up": len(replies) - len(texts),
        "lost": len(problems),
        "as_alone": as_alone,
        "anothers": sum(text in alone.values() for _, text in texts) - as_alone,
        "problems": problems[:_MAX_PROBLEMS],
        "tokens_per_second": spread([1 / each for each in seconds]),
        "first_seconds": {
            "median": median(first) if first else None,
            "worst": max(first, default=None),
        },
    }


def questions() -> list[str]:
    """Questions of different lengths."""
    pairs = zip(LENGTHS, TOPICS, strict=True)
    return [f"{SENTENCE * n}Write a sentence about {topic}." for n, topic in pairs]


def make_table(result: dict) -> Table:
    """The table of all loads."""
    table = new_table(
        "{model}: {requests} requests for each number of clients, answers of at most {tokens} "
        "tokens".format(**result),
        ("clients", "server", "tokens/s", "first s", "worst", "as alone"),
        "tokens/s: of all clients together. first s: seconds to the first text, the median.\n"
        "as alone: answers with the text that the question has alone; others hung up.\n"
        f"{outcome(result)}",
        left=2,
    )
    for n, loads in groupby(result["loads"], key=lambda load: load["clients"]):
        for load in loads:
            first = load["first_seconds"]
            table.add_row(
                str(n),
                load["server"],
                f"{load['tokens_per_second']['median']:.1f}",
                *("–" if s is None else f"{s:.2f}" for s in (first["median"], first["worst"])),
                f"{load['as_alone']} of {load['answered']}",
            )
        table.add_section()
    return table


def outcome(result: dict) -> str:
    """Sentences on the answers that were lost or mixed up."""
    lost = sum(load["lost"] for load in result["loads"])
    anothers = sum(load["anothers"] for load in result["loads"])
    if not (lost or anothers):
        return "No answer was lost, none was another question's."
    problems = [problem for load in result["loads"] for problem in load["problems"]]
    summary = f"Lost: {lost}. Of another question: {anothers}."
    return "\n".join([summary, *problems[:_MAX_PROBLEMS]])
