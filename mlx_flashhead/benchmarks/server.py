"""Servers under load: FlashHead, dense, and mlx-lm's own, with several clients at once.

Every server has a process of its own, and none of them keeps caches of prompts, so that each prompt
is read. Some clients hang up after the first text. The other answers are compared with those to the
same questions alone.
"""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Lock, Thread

from tqdm import tqdm

from ..common.timing import Spread
from .clients import ServerProcess, ask

FLASH_HEAD, DENSE, MLX_LM = "FlashHead", "dense", "mlx_lm.server"
CLIENTS = (1, 4, 8, 16)
TOPICS = ("the moon", "bread", "rivers", "the number seven", "bees", "glass", "winter", "trains")
SENTENCE = "The bridge over the river was old and narrow, and nobody knew who had built it. "
# Sentences before a question. Prompts of different lengths must not hold each other up.
LENGTHS = (0, 4, 1, 0, 2, 0, 8, 1)
# Of so many clients in succession one hangs up.
HANGS_UP = 5
_QUARTERS = 4
_MAX_TOLD = 5


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
        memory_mb: Of each round: resident memory at the beginning, after each quarter of the
            requests, and at the end.
    """

    answered: int = 0
    hung_up: int = 0
    as_alone: int = 0
    anothers: int = 0
    problems: list[str] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    memory_mb: list[list[float]] = field(default_factory=list)

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


def server_benchmark(
    folder: Path,
    *,
    options: Sequence[str] = (),
    clients: Sequence[int] = CLIENTS,
    requests: int = 16,
    tokens: int = 16,
    rounds: int = 1,
    progress: bool = True,
) -> dict:
    """Puts three servers of one checkpoint under load, in turns.

    Args:
        folder: The model's folder.
        options: Further flags of the server with FlashHead, such as ``--n-probes``.
        clients: Numbers of clients at once.
        requests: Requests to a server for each number of clients.
        tokens: Greatest number of an answer's tokens.
        rounds: Rounds over all servers and numbers of clients, each in another order.
        progress: Show a bar.

    Returns:
        JSON-ready: for each number of clients and each server the figures of :class:`Load`.

    Raises:
        ValueError: If a server does not start, or does not answer a question alone.
    """
    model = ("--model", str(folder))
    caches = ("--prompt-cache-size", "0")
    commands = {
        FLASH_HEAD: ("mlx_flashhead.server", *model, *caches, *options),
        DENSE: ("mlx_flashhead.server", *model, *caches, "--dense"),
        MLX_LM: ("mlx_lm.server", *model, *caches),
    }
    loads = {(n, name): Load() for n in clients for name in commands}
    draw = random.Random(0)
    bar = tqdm(total=rounds * len(loads), desc="Starting servers", unit="run", leave=False,
               disable=not progress)  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(bar)
        servers = {
            name: stack.enter_context(ServerProcess(*command)) for name, command in commands.items()
        }
        bar.set_description("Serving")
        alone = {name: _answers_alone(server, tokens) for name, server in servers.items()}
        for _ in range(rounds):
            for n in clients:
                for name in draw.sample(list(servers), len(servers)):
                    _Run(servers[name], alone[name], requests, tokens, loads[n, name]).go(n)
                    bar.update()
    return {
        "model": folder.name,
        "requests": requests,
        "tokens": tokens,
        "rounds": rounds,
        "loads": [
            {"clients": n, "server": name, **load.to_dict()} for (n, name), load in loads.items()
        ],
    }


def questions() -> list[str]:
    """Questions of different lengths."""
    asked = (f"Write a sentence about {topic}." for topic in TOPICS)
    return [SENTENCE * n + question for n, question in zip(LENGTHS, asked, strict=True)]


def _answers_alone(server: ServerProcess, tokens: int) -> dict[str, str]:
    return {
        question: ask(server.port, question, max_tokens=tokens).text for question in questions()
    }


class _Run:
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
        self._questions = list(alone)
        self._requests = requests
        self._next = 0
        self._n_tokens = 0
        self._memory: list[float] = []
        self._lock = Lock()

    def go(self, n_clients: int) -> None:
        """Sends all requests and waits for the answers."""
        self._memory = [self._server.resident_mb()]
        began = time.monotonic()
        threads = [Thread(target=self._ask_on, daemon=True) for _ in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._load.tokens_per_second.append(self._n_tokens / (time.monotonic() - began))
        self._load.memory_mb.append([*self._memory, self._server.resident_mb()])

    def _ask_on(self) -> None:
        """A client: it asks one question after the other until all are asked."""
        while True:
            with self._lock:
                number, self._next = self._next, self._next + 1
                if number and number in _marks(self._requests):
                    self._memory.append(self._server.resident_mb())
            if number >= self._requests:
                return
            self._ask(number)

    def _ask(self, number: int) -> None:
        question = self._questions[number % len(self._questions)]
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


def _marks(requests: int) -> set[int]:
    """Requests at whose beginning a quarter of all is done."""
    return {requests * quarter // _QUARTERS for quarter in range(1, _QUARTERS)}
