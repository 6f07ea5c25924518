"""Keeps a server busy for minutes with clients of all kinds, and reports the outcome.

    python scripts/soak.py --model smollm2-flashhead [--minutes 10] [--clients 8]

Most requests are sound. Their answers are compared with earlier answers of the idle server. The
others hang up, send long texts, texts that are too long, or nonsense.
"""

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median, quantiles
from threading import Lock, Thread

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))  # works uninstalled too

from mlx_flashhead.benchmarks.clients import (
    CHAT_PATH,
    HOST,
    ServerProcess,
    ask,
    question_body,
    serving,
)
from mlx_flashhead.benchmarks.kinds.server import SENTENCE, TOPICS
from mlx_flashhead.common.arguments import Parser, number, whole_number
from mlx_flashhead.common.command import command

TOKENS = 24
FORMS = (
    "Write a sentence about {}.",
    "What is known about {}? " + "Think of all sides of it. " * 20,
)
KINDS = {"sound": 12, "hangs up": 4, "long text": 1, "too long": 1, "nonsense": 4}
NONSENSE = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
)
BODIES = (
    b"{",
    b"[" * 100_000,
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "n_probes": -1}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "model": "/etc"}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "no_such_field": 1}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": '
    b'{"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
    b'{% endfor %}"}}',
)


@dataclass
class Tally:
    """The counts of a run.

    Attributes:
        requests: Number of requests of each kind.
        outcomes: Outcomes of sound requests and of those that the server must refuse.
        first: Seconds to the first text of sound streams.
        memory: (seconds since the start, resident megabytes) of the server.
        problems: Sentences on failures.
    """

    requests: Counter = field(default_factory=Counter)
    outcomes: Counter = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


class Client:
    """One of the clients.

    Args:
        port: The server's port.
        expected: Question → answer.
        tally: Counts the outcomes.
        seed: Seed of the client's choices.
    """

    def __init__(self, port: int, expected: dict[str, str], tally: Tally, seed: int):
        self._port, self._expected, self._tally = port, expected, tally
        self._random = random.Random(seed)

    def run(self, until: float) -> None:
        """Sends one request after the other."""
        acts = {
            "sound": self._sound,
            "hangs up": self._hang_up,
            "long text": self._long,
            "too long": self._too_long,
            "nonsense": self._nonsense,
        }
        while time.monotonic() < until:
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            try:
                outcome, problem = acts[kind]()
            except (OSError, HTTPException, ValueError) as error:
                outcome, problem = f"{kind}: failed", repr(error)
            with self._tally.lock:
                self._tally.requests[kind] += 1
                self._tally.outcomes[outcome] += 1
                if problem:
                    self._tally.problems.append(f"{kind}: {problem}"[:300])

    def _sound(self) -> tuple[str, str | None]:
        question = self._random.choice(list(self._expected))
        reply = ask(self._port, question, max_tokens=TOKENS)
        if reply.first_seconds is not None:
            with self._tally.lock:
                self._tally.first.append(reply.first_seconds)
        if reply.text == self._expected[question]:
            return "sound: as alone", None
        return "sound: another text", f"{question[:40]!r} got {reply.text!r}"

    def _hang_up(self) -> tuple[str, str | None]:
        body = question_body(self._random.choice([SENTENCE * 150, *self._expected]), 500)
        with socket.create_connection((HOST, self._port), timeout=60) as connection:
            connection.sendall(_head(len(body)) + body)
            time.sleep(self._random.choice([0, 0.1, 0.5, 2.0]))
        return "hung up", None

    def _long(self) -> tuple[str, str | None]:
        reply = ask(self._port, SENTENCE * 100, max_tokens=4)
        return "long text: answered", None if reply.text else "no answer"

    def _too_long(self) -> tuple[str, str | None]:
        status, answer = _post(self._port, question_body(SENTENCE * 2000, TOKENS))
        return f"too long: {status}", None if status == 400 else str(answer)

    def _nonsense(self) -> tuple[str, str | None]:
        if self._random.random() < 0.5:
            status, answer = _post(self._port, self._random.choice(BODIES))
            refused = status in (400, 404) and "message" in answer["error"]
            return f"nonsense: {status}", None if refused else str(answer)
        with socket.create_connection((HOST, self._port), timeout=60) as connection:
            connection.sendall(self._random.choice(NONSENSE))
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        status = answer[9:12].decode() or "closed"
        return f"nonsense: {status}", None


def _head(length: int) -> bytes:
    return (
        f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
    )


def _post(port: int, body: bytes) -> tuple[int, dict]:
    connection = HTTPConnection(HOST, port, timeout=600)
    connection.request("POST", CHAT_PATH, body)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def _watch(server: ServerProcess, tally: Tally, until: float) -> None:
    """Every few seconds notes the server's memory, and checks that ``/health`` answers at once."""
    began = time.monotonic()
    while time.monotonic() < until:
        asked = time.monotonic()
        healthy = server.health() is not None
        with tally.lock:
            tally.memory.append((asked - began, server.resident_mb()))
            if not healthy or time.monotonic() - asked > 5:
                tally.problems.append(f"/health took {time.monotonic() - asked:.1f} s")
        time.sleep(2)


def report(tally: Tally, log: str, code: int) -> list[str]:
    """The outcome as a page."""
    lines = ["| requests | number |", "|---|---:|"]
    lines += [f"| {kind} | {tally.requests[kind]:,} |" for kind in KINDS]
    lines += ["", "| outcome | number |", "|---|---:|"]
    lines += [f"| {name} | {n:,} |" for name, n in sorted(tally.outcomes.items())]
    if len(tally.first) > 1:
        last = quantiles(tally.first, n=20)[-1]
        lines += [
            "",
            f"First text after {median(tally.first):.1f} s (median), {last:.1f} s (95 %).",
        ]
    quarters = [tally.memory[i * (len(tally.memory) - 1) // 4] for i in range(5)]
    said = ", ".join(f"{size:,.0f} MB after {seconds:.0f} s" for seconds, size in quarters)
    lines += ["", f"Resident memory: {said}."]
    lines.append(f"Log: {len(log.splitlines()):,} lines, {log.count('Traceback')} tracebacks.")
    lines.append(f"Exit code after SIGTERM: {code}.")
    lines += ["", *sorted(set(tally.problems))]
    return lines


@command
def main() -> None:
    """Entry point."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Folder of a FlashHead checkpoint.")
    parser.add_argument("--minutes", type=number(0, above=True), default=10.0)
    parser.add_argument("--clients", type=whole_number(1), default=8)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    args = parser.parse_args()
    tally = Tally()
    with serving("mlx_flashhead.server", "--model", args.model) as server:
        _run(args, server, tally)
        code = server.end()
        print("\n".join(report(tally, server.log(), code)))
    if tally.problems or code:
        sys.exit(1)


def _run(args: argparse.Namespace, server: ServerProcess, tally: Tally) -> None:
    questions = [form.format(topic) for form in FORMS for topic in TOPICS]
    expected = {
        question: ask(server.port, question, max_tokens=TOKENS).text for question in questions
    }
    until = time.monotonic() + 60 * args.minutes
    threads = [Thread(target=_watch, args=(server, tally, until))]
    for i in range(args.clients):
        client = Client(server.port, expected, tally, args.seed + i)
        threads.append(Thread(target=client.run, args=(until,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
