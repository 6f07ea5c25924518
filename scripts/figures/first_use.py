"""The first use of a model that has no FlashHead yet: how long each program takes to what.

    python scripts/figures/first_use.py MODEL [--rounds 3] [--json first-use.json]

Seconds to the first token of ``generate``, ``chat`` and ``server``, in turns with mlx-lm's dense
programs, to the end of the build, and to the first token after it. From the start of
``generate``, and from the message or request otherwise. Each round has an empty home of FlashHeads.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

from mlx_flashhead.benchmarks.clients import HOST, ask, serving
from mlx_flashhead.benchmarks.machine import machine
from mlx_flashhead.benchmarks.report import cells
from mlx_flashhead.common.command import check_writable, command
from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.common.timing import spread
from mlx_flashhead.index.files import SETTINGS_NAME

QUESTION = "Write a sentence about the moon."
ANOTHER = "Name three rivers of Europe."
TOKENS = 24
TEXT_BEGINS = "=========="
CODES = rb"\x1b\[[\d;?]*[A-Za-z]"  # of a terminal
SETTLED, BUILD_SECONDS = 2.0, 3600


class Program:
    """A program at a terminal; what it prints is kept with the seconds since its start."""

    def __init__(self, module: str, *arguments: str):
        environment = os.environ | {"TERM": "dumb"}
        self._terminal, its_side = os.openpty()
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=its_side,
            stdout=its_side,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        os.close(its_side)
        self._pieces: list[tuple[float, bytes]] = []
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError):  # at its end
            while piece := os.read(self._terminal, 4096):
                self._pieces.append((self.seconds(), piece))

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def type(self, line: str) -> None:
        """Types a line, and forgets what was printed before."""
        self._pieces.clear()
        os.write(self._terminal, f"{line}\r".encode())

    def settle(self) -> None:
        """Waits until it has printed nothing for a while, as at its prompt."""
        _wait(lambda: bool(self._pieces) and self.seconds() - self._pieces[-1][0] > SETTLED)

    def text_after(self, mark: str) -> float:
        """Seconds to the first word that was printed after ``mark``."""
        while True:
            printed = b""
            for seconds, piece in list(self._pieces):
                printed += re.sub(CODES, b"", piece)
                _, marked, rest = printed.partition(mark.encode())
                if marked and re.search(rb"\w", rest):
                    return seconds
            if self._process.poll() is not None:
                raise ValueError(f"{' '.join(self._process.args[2:])} printed no text.")
            time.sleep(0.001)

    def end(self) -> float:
        """Seconds to its end."""
        self._process.wait(BUILD_SECONDS)
        return self.seconds()


def generate(module: str, model: str) -> dict[str, float]:
    """One prompt; ours builds afterwards, and a second run has the FlashHead."""
    prompt = ("--model", model, "--prompt", QUESTION, "--max-tokens", str(TOKENS), "--temp", "0")
    program = Program(module, *prompt)
    times = {"first token": program.text_after(TEXT_BEGINS), "end": program.end()}
    if module.startswith("mlx_flashhead"):
        again = Program(module, *prompt)
        times["first token after it"] = times["end"] + again.text_after(TEXT_BEGINS)
        again.end()
    return times


def chat(module: str, model: str) -> dict[str, float]:
    """One message at the prompt, and a second one once there is a FlashHead."""
    program = Program(module, "--model", model, "--max-tokens", str(TOKENS), "--temp", "0")

    def first_token(question: str) -> float:
        began = program.seconds()
        program.type(question)
        return program.text_after("\n") - began  # which ends the echo

    program.settle()
    began = program.seconds()
    times = {"first token": first_token(QUESTION)}
    if module.startswith("mlx_flashhead"):
        _wait(lambda: any(Path(os.environ["MLX_FLASHHEAD_HOME"]).rglob(SETTINGS_NAME)))
        times["end"] = program.seconds() - began
        times["first token after it"] = times["end"] + first_token(ANOTHER)
    program.type("q")
    program.end()
    return times


def server(module: str, model: str) -> dict[str, float]:
    """One request, and a second one once /health names a FlashHead."""
    with serving(module, "--model", model) as port:
        began = time.monotonic()
        times = {"first token": _first(port, QUESTION)}
        if module.startswith("mlx_flashhead"):
            before = _heads(port)
            _wait(lambda: _heads(port) != before)
            times["end"] = time.monotonic() - began
            times["first token after it"] = times["end"] + _first(port, ANOTHER)
    return times


def _first(port: int, question: str) -> float:
    seconds = ask(port, question, max_tokens=TOKENS).first_seconds
    assert seconds is not None
    return seconds


def _heads(port: int) -> list[str]:
    connection = HTTPConnection(HOST, port, timeout=60)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())["heads"]


def _wait(happens: Callable[[], bool]) -> None:
    until = time.monotonic() + BUILD_SECONDS
    while not happens():
        if time.monotonic() > until:
            raise ValueError("No FlashHead was built.")
        time.sleep(0.05)


PROGRAMS = {"generate": generate, "chat": chat, "server": server}


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's folder, without a FlashHead")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    if args.json:
        check_writable("--json", args.json)
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(args.rounds):
        for name, run in PROGRAMS.items():
            for library in ("mlx_lm", "mlx_flashhead"):
                with tempfile.TemporaryDirectory() as home:
                    os.environ["MLX_FLASHHEAD_HOME"] = home
                    times = run(f"{library}.{name}", args.model)
                for event, taken in times.items():
                    seconds.setdefault(f"{library}.{name}", {}).setdefault(event, []).append(taken)
                told = ", ".join(f"{event} {taken:.2f} s" for event, taken in times.items())
                print(f"[{number + 1} of {args.rounds}] {library}.{name}: {told}", file=sys.stderr)
    table = new_table(Path(args.model).name, ("program", "until", "median s", "quartiles"), left=2)
    for name, events in seconds.items():
        for event, taken in events.items():
            table.add_row(name, event, *cells(spread(taken)))
    show(table)
    if args.json:
        figures = {"model": Path(args.model).name, "machine": machine(), "seconds": seconds}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
