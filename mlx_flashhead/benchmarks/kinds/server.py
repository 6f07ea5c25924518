"""Puts three servers under load, in turns: with FlashHead, dense, and mlx-lm's own.

Every server has a process of its own, and none of them keeps caches of prompts, so that each prompt
is read. Clients stream answers to prompts of different lengths. Some hang up after the first text.
The other answers are compared with those to the same questions alone.
"""

import argparse
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median

from ...common.arguments import whole_numbers
from ...common.tables import Table, new_table
from ...common.timing import Spread
from ...models.fetch import resolve
from ..clients import Reply, ServerProcess, ask, serving
from ..report import Bars, add_model_arguments, add_number, add_report_arguments, report
from ..rounds import Round

FLASH_HEAD, DENSE, MLX_LM = "FlashHead", "dense", "mlx_lm.server"
CLIENTS = (1, 4, 8, 16)
TOPICS = ("the moon", "bread", "rivers", "the number seven", "bees", "glass", "winter", "trains")
SENTENCE = "The bridge over the river was old and narrow, and nobody knew who had built it. "
# Sentences before a question. Prompts of different lengths must not hold each other up.
LENGTHS = (0, 4, 1, 0, 2, 0, 8, 1)
# Of so many clients in succession one hangs up.
HANGS_UP = 5
_MAX_PROBLEMS = 5


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
    report(args, measure(args), make_table, bars)


@dataclass
class Load:
    """One server with one number of clients, over all rounds: each question with its reply.

    ``memory_mb`` is resident before and after a round.
    """

    replies: list[tuple[str, Reply]] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    memory_mb: list[tuple[float, float]] = field(default_factory=list)

    def visit(
        self, server: ServerProcess, questions: list[str], clients: int, requests: int, tokens: int
    ) -> None:
        """A round: several clients at once, each with one question after the other."""

        def reply(number: int) -> tuple[str, Reply]:
            question = questions[number % len(questions)]
            leaves = number % HANGS_UP == HANGS_UP - 1
            try:
                return question, ask(server.port, question, max_tokens=tokens, hang_up=leaves)
            except (OSError, ValueError) as error:
                return question, Reply(problem=f"{question[-40:]!r}: {error}"[:300])

        before, began = server.resident_mb(), time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            replies = list(pool.map(reply, range(requests)))
        seconds = time.monotonic() - began
        self.replies += replies
        n_tokens = sum(reply.n_tokens or 0 for _, reply in replies)
        self.tokens_per_second.append(n_tokens / seconds)
        self.memory_mb.append((before, server.resident_mb()))

    def figures(self, alone: dict[str, str]) -> dict:
        """JSON-ready, with the text that each question has alone.

        Complete answers are ``as_alone``, or ``anothers`` with the text of another question.
        """
        replies = [reply for _, reply in self.replies]
        texts = [(question, r.text) for question, r in self.replies if r.n_tokens is not None]
        as_alone = sum(text == alone[question] for question, text in texts)
        first = [reply.first_seconds for reply in replies if reply.first_seconds is not None]
        problems = [reply.problem for reply in replies if reply.problem]
        return {
            "answered": len(texts),
            "hung_up": len(replies) - len(texts) - len(problems),
            "lost": len(problems),
            "as_alone": as_alone,
            "anothers": sum(text in alone.values() for _, text in texts) - as_alone,
            "problems": problems[:_MAX_PROBLEMS],
            "tokens_per_second": Spread.of(self.tokens_per_second).to_dict(),
            "first_seconds": {
                "median": median(first) if first else None,
                "worst": max(first, default=None),
            },
            "memory_mb": self.memory_mb,
        }


def measure(args: argparse.Namespace) -> Iterator[Round]:
    """Puts three servers of one model under load, in another order each round."""
    folder = resolve(args.model)
    model = ("--model", str(folder), "--prompt-cache-size", "0")
    flags = ["--n-probes", str(args.n_probes)] if args.n_probes is not None else []
    flags += ["--flash-head", args.flash_head] if args.flash_head is not None else []
    # neither the build nor dense steps are to be measured
    flags += ["--no-build" if args.no_build else "--build-first", "--flash-head-always"]
    commands = {
        FLASH_HEAD: ("mlx_flashhead.server", *model, *flags),
        DENSE: ("mlx_flashhead.server", *model, "--dense"),
        MLX_LM: ("mlx_lm.server", *model),
    }
    loads = {(n, name): Load() for n in args.clients for name in commands}
    order = random.Random(0)
    done, total = 0, args.rounds * len(loads)
    yield Round(0, total, "three servers start, and answer each question alone", [])
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(*command)) for name, command in commands.items()
        }
        alone = {
            name: {q: ask(server.port, q, max_tokens=args.tokens).text for q in questions()}
            for name, server in servers.items()
        }
        yield Round(0, total, f"{args.requests} requests each to three servers", [])
        for _ in range(args.rounds):
            for n in args.clients:
                for name in order.sample(list(servers), len(servers)):
                    load = loads[n, name]
                    load.visit(servers[name], questions(), n, args.requests, args.tokens)
                    done += 1
                    result = {
                        "model": folder.name,
                        "requests": args.requests,
                        "tokens": args.tokens,
                        "loads": [
                            {"clients": n, "server": name, **load.figures(alone[name])}
                            for (n, name), load in loads.items()
                            if load.replies
                        ],
                    }
                    speed = load.tokens_per_second[-1]
                    news = f"{n} at once, {name}: {speed:.1f} tokens/s"
                    yield Round(done, total, news, [result])


def questions() -> list[str]:
    """Questions of different lengths."""
    pairs = zip(LENGTHS, TOPICS, strict=True)
    return [f"{SENTENCE * n}Write a sentence about {topic}." for n, topic in pairs]


def make_table(result: dict) -> Table:
    """The table of all loads."""
    table = new_table(
        "{model}: {requests} requests for each number of clients, answers of at most {tokens} "
        "tokens".format(**result),
        ("clients", "server", "tokens/s", "first s", "worst", "as alone", "MB"),
        "tokens/s: of all clients together. first s: seconds to the first text, the median.\n"
        "as alone: answers with the text that the question has alone; others hung up.\n"
        f"MB: resident memory at the beginning and the end. {outcome(result)}",
        left=2,
    )
    for n, loads in groupby(result["loads"], key=lambda load: load["clients"]):
        for number, load in enumerate(loads):
            first = load["first_seconds"]
            table.add_row(
                "" if number else str(n),
                load["server"],
                f"{load['tokens_per_second']['median']:.1f}",
                *("–" if s is None else f"{s:.2f}" for s in (first["median"], first["worst"])),
                f"{load['as_alone']} of {load['answered']}",
                f"{load['memory_mb'][0][0]:,.0f} → {load['memory_mb'][-1][-1]:,.0f}",
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


def bars(result: dict) -> Bars:
    """The tokens per second."""
    speeds = {
        f"{load['clients']} at once, {load['server']}": load["tokens_per_second"]["median"]
        for load in result["loads"]
    }
    return result["model"], "tokens/s of all clients", speeds
