"""Puts three servers under load, in turns: with FlashHead, dense, and mlx-lm's own.

They keep no caches of prompts. Clients stream answers to prompts of different lengths, and some
hang up after the first text. The other answers are compared with those to each question alone.
"""

import argparse
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.table import Table

from ..common.tables import new_table
from ..models.fetch import resolve
from .reporting import Case, spread

TOPICS = ("the moon", "bread", "rivers", "the number seven", "bees", "glass", "winter", "trains")
SENTENCE = "The bridge over the river was old and narrow, and nobody knew who had built it. "
LENGTHS = (0, 4, 1, 0, 2, 0, 8, 1)  # sentences before each question
HANGS_UP = 5  # one in so many clients
HOST, ANSWER_SECONDS = "127.0.0.1", 600


class Reply(NamedTuple):
    """An answer, the server's count of tokens, None if the client hung up, and the seconds to the
    first text. A lost one has a problem."""

    question: str
    text: str = ""
    n_tokens: int | None = None
    first_seconds: float | None = None
    problem: str | None = None


def cases(args: argparse.Namespace) -> Generator[Case]:
    model = ("--model", str(resolve(args.model)), "--prompt-cache-size", "0")
    flags = ["--n-probes", str(args.n_probes)] if args.n_probes is not None else []
    flags += ["--flash-head", args.flash_head] if args.flash_head is not None else []
    # neither the build nor dense steps are to be measured
    flags += ["--no-build" if args.no_build else "--build-first", "--flash-head-always"]
    commands = {
        "FlashHead": ("mlx_flashhead.server", *model, *flags),
        "dense": ("mlx_flashhead.server", *model, "--dense"),
        "mlx_lm.server": ("mlx_lm.server", *model),
    }
    print("Three servers start, and answer each question alone.", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        ports = {name: stack.enter_context(serving(*each)) for name, each in commands.items()}
        alone = {
            name: {q: ask(port, q, max_tokens=args.tokens).text for q in questions()}
            for name, port in ports.items()
        }
        for n in args.clients:
            replies: dict[str, list[Reply]] = {name: [] for name in ports}
            timers = {
                name: partial(visit, port, n, args.requests, args.tokens, replies[name])
                for name, port in ports.items()
            }
            about = {"model": Path(args.model).name, "clients": n}
            about |= {"requests": args.requests, "tokens": args.tokens}
            yield Case(f"{n} at once, per token", timers, partial(summary, about, replies, alone))


def questions() -> list[str]:
    pairs = zip(LENGTHS, TOPICS, strict=True)
    return [f"{SENTENCE * n}Write a sentence about {topic}." for n, topic in pairs]


def visit(
    port: int, clients: int, requests: int, tokens: int, replies: list[Reply], number: int
) -> float:
    """A round of one server: several clients at once, each with one question after the other, which
    adds to ``replies``. The seconds for a token of all clients."""
    if number == 0:
        return 0.0  # the questions alone have warmed it up
    several = questions()

    def request(i: int) -> Reply:
        question, leaves = several[i % len(several)], i % HANGS_UP == HANGS_UP - 1
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
    return seconds / n_tokens if n_tokens else math.inf


def summary(about: dict, replies: dict, alone: dict, seconds: dict[str, list[float]]) -> dict:
    """The figures of each server with one number of clients, JSON-ready."""
    loads = {name: figures(replies[name], alone[name], seconds[name]) for name in seconds}
    return about | {"loads": loads}


def figures(replies: list[Reply], alone: dict[str, str], seconds: list[float]) -> dict:
    """The figures of one server; complete answers with their question's text in ``alone`` count."""
    complete = [reply for reply in replies if reply.n_tokens is not None]
    problems = [reply.problem for reply in replies if reply.problem is not None]
    first = [reply.first_seconds for reply in replies if reply.first_seconds is not None]
    times = {"median": median(first) if first else None, "worst": max(first, default=None)}
    return {
        "answered": len(complete),
        "hung_up": len(replies) - len(complete) - len(problems),
        "lost": len(problems),
        "as_alone": sum(reply.text == alone[reply.question] for reply in complete),
        "problems": problems[:5],
        "tokens_per_second": spread([1 / each for each in seconds]),
        "first_seconds": times,
    }


def make_table(result: dict) -> Table:
    loads = result["loads"]
    lost = [f"Answers lost: {sum(load['lost'] for load in loads.values())}."]
    lost += [problem for load in loads.values() for problem in load["problems"]]
    title = "{model}, {clients} clients: {requests} requests, answers of at most {tokens} tokens"
    caption = "tokens/s: of all clients together. first s: median seconds to the first text.\n"
    caption += "as alone: complete answers with the text that the question has alone.\n"
    headings = ("server", "tokens/s", "first s", "worst", "as alone")
    table = new_table(title.format(**result), headings, caption + "\n".join(lost))
    for server, load in loads.items():
        times = ("–" if s is None else f"{s:.2f}" for s in load["first_seconds"].values())
        speed = f"{load['tokens_per_second']['median']:.1f}"
        same = f"{load['as_alone']} of {load['answered']}"
        table.add_row(server, speed, *times, same)
    return table


@contextmanager
def serving(module: str, *arguments: str) -> Iterator[int]:
    """The port of a server that runs within the block; ValueError if it ends before it answers."""
    with socket.create_server((HOST, 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", module, *arguments, "--host", HOST, "--port", str(port)]
    nowhere = subprocess.DEVNULL
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=errors) as server,
    ):
        try:
            while not _healthy(port):
                if server.poll() is not None:
                    errors.seek(0)
                    lines = errors.read().strip().splitlines() or ["it printed nothing"]
                    raise ValueError(f"{' '.join(command[2:])} did not start: {lines[-1]}")
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()


def _healthy(port: int) -> bool:
    with suppress(OSError, HTTPException), closing(HTTPConnection(HOST, port, timeout=10)) as http:
        http.request("GET", "/health")
        return http.getresponse().status == 200
    return False


def ask(port: int, question: str, *, max_tokens: int, hang_up: bool = False) -> Reply:
    """A server's greedy answer. With ``hang_up`` the client leaves after the first text. ValueError
    if it answers with an error or not completely, OSError if not at all."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    began, text, first = time.monotonic(), "", None
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
