"""Servers under load: FlashHead, dense, and mlx-lm's own, with several clients at once.

Every server has a process of its own, and none of them keeps caches of prompts, so that each prompt
is read. Some clients hang up after the first text. The other answers are compared with those to the
same questions alone.
"""

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from ...common.arguments import whole_numbers
from ...common.tables import new_table
from ...common.timing import Spread
from ...models.fetch import resolve
from ..clients import ServerProcess, ask
from ..report import Round, add_model_arguments, add_number, add_report_arguments, report

if TYPE_CHECKING:
    from rich.table import Table

HELP = "put servers under load"
DESCRIPTION = (
    "Put three servers of one model under load, in turns: with FlashHead, dense, and mlx-lm's own. "
    "Clients stream answers to prompts of different lengths, and some hang up."
)
FLASH_HEAD, DENSE, MLX_LM = "FlashHead", "dense", "mlx_lm.server"
CLIENTS = (1, 4, 8, 16)
TOPICS = ("the moon", "bread", "rivers", "the number seven", "bees", "glass", "winter", "trains")
SENTENCE = "The bridge over the river was old and narrow, and nobody knew who had built it. "
# Sentences before a question. Prompts of different lengths must not hold each other up.
LENGTHS = (0, 4, 1, 0, 2, 0, 8, 1)
# Of so many clients in succession one hangs up.
HANGS_UP = 5
_MAX_TOLD = 5


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
    report(args, measure(args), make_table, draw)


@dataclass
class Load:
    """The figures of one server with one number of clients, over all rounds.

    Attributes:
        answered: Complete answers.
        hung_up: Clients that have left, as they should.
        as_alone: Complete answers with the text that the question has alone.
        anothers: Complete answers with the text of another question.
        problems: A sentence for each request that was lost.
        tokens_per_second: Of each round: tokens of complete answers over the whole time.
        first_seconds: Of each request: seconds to its first text.
        memory_mb: Of each round: resident memory at its beginning and its end.
    """

    answered: int = 0
    hung_up: int = 0
    as_alone: int = 0
    anothers: int = 0
    problems: list[str] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    memory_mb: list[tuple[float, float]] = field(default_factory=list)

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {
            "answered": self.answered,
            "hung_up": self.hung_up,
            "lost": len(self.problems),
            "as_alone": self.as_alone,
            "anothers": self.anothers,
            "problems": self.problems[:_MAX_TOLD],
            "tokens_per_second": Spread.of(self.tokens_per_second).to_dict(),
            "first_seconds": {
                "median": median(self.first_seconds) if self.first_seconds else None,
                "worst": max(self.first_seconds, default=None),
            },
            "memory_mb": self.memory_mb,
        }


def measure(args: argparse.Namespace) -> Iterator[Round]:
    """Puts three servers of one model under load, in another order each round.

    Raises:
        ValueError: If a server does not start, or does not answer a question alone.
    """
    folder = resolve(args.model)
    model = ("--model", str(folder), "--prompt-cache-size", "0")
    flags = ["--n-probes", str(args.n_probes)] if args.n_probes is not None else []
    flags += ["--flash-head", args.flash_head] if args.flash_head is not None else []
    flags += ["--no-build"] if args.no_build else []
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
            name: stack.enter_context(ServerProcess(*command)) for name, command in commands.items()
        }
        alone = {name: _answers_alone(server, args.tokens) for name, server in servers.items()}
        yield Round(0, total, f"{args.requests} requests each to three servers", [])
        for _ in range(args.rounds):
            for n in args.clients:
                for name in order.sample(list(servers), len(servers)):
                    load = loads[n, name]
                    Visit(servers[name], alone[name], args.requests, args.tokens, load).go(n)
                    done += 1
                    result = {
                        "model": folder.name,
                        "requests": args.requests,
                        "tokens": args.tokens,
                        "loads": [
                            {"clients": clients, "server": server, **measured.to_dict()}
                            for (clients, server), measured in loads.items()
                            if measured.tokens_per_second
                        ],
                    }
                    speed = load.tokens_per_second[-1]
                    news = f"{n} at once, {name}: {speed:.1f} tokens/s"
                    yield Round(done, total, news, [result])


def questions() -> list[str]:
    """Questions of different lengths."""
    asked = (f"Write a sentence about {topic}." for topic in TOPICS)
    return [SENTENCE * n + question for n, question in zip(LENGTHS, asked, strict=True)]


def make_table(one: dict) -> "Table":
    """The table of all loads."""
    table = new_table(
        f"{one['model']}: {one['requests']} requests for each number of clients, answers of at "
        f"most {one['tokens']} tokens",
        ("clients", "server", "tokens/s", "first s", "worst", "as alone", "MB"),
        "tokens/s: of all clients together. first s: seconds to the first text, the median.\n"
        "as alone: answers with the text that the question has alone; others hung up.\n"
        f"MB: resident memory at the beginning and the end. {outcome(one)}",
        left=2,
    )
    for n, loads in groupby(one["loads"], key=lambda load: load["clients"]):
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


def outcome(one: dict) -> str:
    """Sentences on the answers that were lost or mixed up."""
    lost = sum(load["lost"] for load in one["loads"])
    anothers = sum(load["anothers"] for load in one["loads"])
    if not (lost or anothers):
        return "No answer was lost, none was another question's."
    told = [problem for load in one["loads"] for problem in load["problems"]]
    return "\n".join([f"Lost: {lost}. Of another question: {anothers}.", *told[:_MAX_TOLD]])


def draw(axis: Any, one: dict) -> None:
    """Draws the tokens per second."""
    colors = {FLASH_HEAD: "tab:blue", DENSE: "tab:gray", MLX_LM: "tab:orange"}
    for load in one["loads"]:
        name = f"{load['clients']} at once, {load['server']}"
        speed = load["tokens_per_second"]["median"]
        axis.bar_label(axis.barh(name, speed, color=colors[load["server"]]), fmt=" %.1f")
    axis.set(title=one["model"], xlabel="tokens/s of all clients")


def _answers_alone(server: ServerProcess, tokens: int) -> dict[str, str]:
    return {
        question: ask(server.port, question, max_tokens=tokens).text for question in questions()
    }


class Visit:
    """Requests of several clients at once to one server.

    Args:
        server: The server.
        alone: The questions, and their answers alone.
        requests: Number of requests.
        tokens: Greatest number of an answer's tokens.
        load: Takes the figures.
    """

    def __init__(
        self, server: ServerProcess, alone: dict[str, str], requests: int, tokens: int, load: Load
    ):
        self._server, self._alone, self._tokens, self._load = server, alone, tokens, load
        self._numbers = iter(range(requests))
        self._n_tokens = 0
        self._lock = Lock()

    def go(self, n_clients: int) -> None:
        """Sends all requests and waits for the answers."""
        before = self._server.resident_mb()
        began = time.monotonic()
        threads = [Thread(target=self._ask_on, daemon=True) for _ in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._load.tokens_per_second.append(self._n_tokens / (time.monotonic() - began))
        self._load.memory_mb.append((before, self._server.resident_mb()))

    def _ask_on(self) -> None:
        """A client: it asks one question after the other until all are asked."""
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            self._ask(number)

    def _ask(self, number: int) -> None:
        question = list(self._alone)[number % len(self._alone)]
        leaves = number % HANGS_UP == HANGS_UP - 1
        load = self._load
        try:
            reply = ask(self._server.port, question, max_tokens=self._tokens, hang_up=leaves)
        except (OSError, ValueError) as error:
            with self._lock:
                load.problems.append(f"{question[-40:]!r}: {error}"[:300])
            return
        with self._lock:
            if reply.first_seconds is not None:
                load.first_seconds.append(reply.first_seconds)
            if reply.n_tokens is None:
                load.hung_up += 1
                return
            load.answered += 1
            self._n_tokens += reply.n_tokens
            if reply.text == self._alone[question]:
                load.as_alone += 1
            elif reply.text in self._alone.values():
                load.anothers += 1
