"""Puts three servers under load, in turns: with FlashHead, dense, and mlx-lm's own: docs/speed.md.

    python scripts/figures/server_load.py --model smollm2-flashhead --report server.json

They keep no caches of prompts. Clients stream answers to prompts of different lengths, and some
hang up after the first text. The other answers are compared with those to each question alone.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from measured_server import HOST, serving
from mlx_flashhead.benchmark import ANY_MODEL, add_common_flags, add_number
from mlx_flashhead.benchmarks.reporting import Case, spread, write_report
from mlx_flashhead.common.arguments import Parser, whole_numbers
from mlx_flashhead.common.command import command
from mlx_flashhead.common.interrupts import ctrl_c_raises
from mlx_flashhead.common.tables import new_table
from mlx_flashhead.models.fetch import resolve

TOPICS = ("the moon", "bread", "rivers", "the number seven", "bees", "glass", "winter", "trains")
SENTENCE = "The bridge over the river was old and narrow, and nobody knew who had built it. "
# So many sentences stand before each question.
LENGTHS = (0, 4, 1, 0, 2, 0, 8, 1)
# One in so many clients hangs up.
HANGS_UP = 5
ANSWER_SECONDS = 600


class Reply(NamedTuple):
    """An answer to a question, as far as it came.

    Attributes:
        n_tokens: Tokens by the server's count; None if the client hung up.
        first_seconds: Seconds to the first text.
        problem: What happened to an answer that was lost.
    """

    question: str
    text: str = ""
    n_tokens: int | None = None
    first_seconds: float | None = None
    problem: str | None = None


def cases(args: argparse.Namespace) -> Generator[Case]:
    """Runs the three servers, and yields what each number of clients is to them."""
    model = ("--model", str(resolve(args.model)), "--prompt-cache-size", "0")
    commands = {
        "FlashHead": ("mlx_flashhead.server", *model, *head_flags(args)),
        "dense": ("mlx_flashhead.server", *model, "--dense"),
        "mlx_lm.server": ("mlx_lm.server", *model),
    }
    print("Three servers start, and answer each question alone.", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(serving(*command)).port for name, command in commands.items()
        }
        alone = {name: answers_alone(port, args.tokens) for name, port in ports.items()}
        for n_clients in args.clients:
            replies: dict[str, list[Reply]] = {name: [] for name in ports}
            timers = {
                name: partial(visit, port, n_clients, args.requests, args.tokens, replies[name])
                for name, port in ports.items()
            }
            about = {
                "model": Path(args.model).name,
                "clients": n_clients,
                "requests": args.requests,
                "tokens": args.tokens,
            }
            figures_of = partial(summary, about, replies, alone)
            yield Case(f"{n_clients} at once, per token", timers, figures_of)


def head_flags(args: argparse.Namespace) -> list[str]:
    """The flags of a server whose FlashHead is there and used: its build is not to be measured."""
    flags = ["--flash-head-always"]
    if args.no_build:
        flags.append("--no-build")
    else:
        flags.append("--build-first")
    if args.n_probes is not None:
        flags += ["--n-probes", str(args.n_probes)]
    if args.flash_head is not None:
        flags += ["--flash-head", args.flash_head]
    return flags


def questions() -> list[str]:
    """Questions of different lengths."""
    pairs = zip(LENGTHS, TOPICS, strict=True)
    return [f"{SENTENCE * n}Write a sentence about {topic}." for n, topic in pairs]


def answers_alone(port: int, n_tokens: int) -> dict[str, str]:
    """The answer to each question, while nobody else asks."""
    return {question: ask(port, question, max_tokens=n_tokens).text for question in questions()}


def visit(
    port: int, clients: int, requests: int, tokens: int, replies: list[Reply], number: int
) -> float:
    """A round of one server: several clients at once, each with one question after the other.

    Args:
        port: The server's port.
        clients: Clients at once.
        requests: Of all clients together.
        tokens: Of an answer, at most.
        replies: Gets the answers.
        number: Of the round; the first one does nothing, since the questions alone warm it up.

    Returns:
        The seconds for a token of all clients.
    """
    if number == 0:
        return 0.0
    several = questions()

    def request(i: int) -> Reply:
        question = several[i % len(several)]
        leaves = i % HANGS_UP == HANGS_UP - 1
        try:
            return ask(port, question, max_tokens=tokens, hang_up=leaves)
        except (OSError, ValueError) as error:
            return Reply(question, problem=f"{question[-40:]!r}: {error}"[:300])

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(request, range(requests)))
    seconds = time.monotonic() - began
    replies += answers
    n_tokens = sum(reply.n_tokens or 0 for reply in answers)
    if n_tokens:
        return seconds / n_tokens
    return math.inf


def summary(
    about: dict[str, Any],
    replies: dict[str, list[Reply]],
    alone: dict[str, dict[str, str]],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    """The figures of each server with one number of clients, JSON-ready."""
    loads = {name: figures(replies[name], alone[name], seconds[name]) for name in seconds}
    return about | {"loads": loads}


def figures(replies: list[Reply], alone: dict[str, str], seconds: list[float]) -> dict[str, Any]:
    """The figures of one server, JSON-ready.

    Args:
        replies: Its answers. Those that hung up, or were lost, are counted by themselves.
        alone: The answer to each question alone.
        seconds: For a token, of each round.
    """
    complete = [reply for reply in replies if reply.n_tokens is not None]
    problems = [reply.problem for reply in replies if reply.problem is not None]
    first = [reply.first_seconds for reply in replies if reply.first_seconds is not None]
    times: dict[str, float | None] = {"median": None, "worst": None}
    if first:
        times = {"median": median(first), "worst": max(first)}
    return {
        "answered": len(complete),
        "hung_up": len(replies) - len(complete) - len(problems),
        "lost": len(problems),
        "as_alone": sum(reply.text == alone[reply.question] for reply in complete),
        "problems": problems[:5],
        "tokens_per_second": spread([1 / each for each in seconds]),
        "first_seconds": times,
    }


def make_table(result: dict[str, Any]) -> Table:
    """The table of one number of clients."""
    loads = result["loads"]
    lost = [f"Answers lost: {sum(load['lost'] for load in loads.values())}."]
    lost += [problem for load in loads.values() for problem in load["problems"]]
    title = "{model}, {clients} clients: {requests} requests, answers of at most {tokens} tokens"
    caption = "tokens/s: of all clients together. first s: median seconds to the first text.\n"
    caption += "as alone: complete answers with the text that the question has alone.\n"
    headings = ("server", "tokens/s", "first s", "worst", "as alone")
    table = new_table(title.format(**result), headings, caption + "\n".join(lost))
    for server, load in loads.items():
        times = []
        for seconds in load["first_seconds"].values():
            cell = "–"
            if seconds is not None:
                cell = f"{seconds:.2f}"
            times.append(cell)
        speed = f"{load['tokens_per_second']['median']:.1f}"
        same = f"{load['as_alone']} of {load['answered']}"
        table.add_row(server, speed, *times, same)
    return table


def ask(port: int, question: str, *, max_tokens: int, hang_up: bool = False) -> Reply:
    """A server's greedy answer.

    Args:
        port: The server's port.
        question: Of the user.
        max_tokens: Of the answer.
        hang_up: The client leaves after the first text.

    Raises:
        ValueError: If it answers with an error, or not completely.
        OSError: If it does not answer.
    """
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json"}
    began = time.monotonic()
    text = ""
    first = None
    with closing(HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        try:
            response = client.getresponse()
            if response.status != 200:
                raise ValueError(f"{response.status}: {response.read().decode(errors='replace')}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(str(chunk["error"]))
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
                if text and first is None:
                    first = time.monotonic() - began
                    if hang_up:
                        return Reply(question, text, None, first)
                if chunk.get("usage"):
                    return Reply(question, text, chunk["usage"]["completion_tokens"], first)
        except HTTPException as error:
            raise ValueError(f"the answer broke off: {error!r}") from error
    raise ValueError("the stream ended without its usage")


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/server_load.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=ANY_MODEL)
    add_common_flags(parser, rounds=1)
    parser.add_argument(
        "--clients",
        type=whole_numbers(1),
        default=[1, 4, 8, 16],
        metavar="1,4,…",
        help="Clients at once (default: 1,4,8,16).",
    )
    add_number(parser, "--requests", 16, "Requests to a server for each number of clients")
    add_number(parser, "--tokens", 16, "Tokens of each answer")
    args = parser.parse_args()
    # At Ctrl-C the figures so far are reported.
    with ctrl_c_raises():
        write_report(
            args,
            cases(args),
            make_table,
            subject="server",
            command="python scripts/figures/server_load.py",
        )


if __name__ == "__main__":
    main()
