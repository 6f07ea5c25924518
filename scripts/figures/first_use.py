"""The first use of a model that has no FlashHead yet: how long each program takes to what.

    python scripts/figures/first_use.py MODEL [--rounds 3] [--json first-use.json]

Seconds to the first token of ``generate``, ``chat`` and ``server``, in turns with mlx-lm's dense
programs, to the end of the build, and to the first token after it. From the start of
``generate``, and from the message or request otherwise. Each round has an empty home of FlashHeads.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pexpect

from mlx_flashhead.benchmarks.clients import ask, serving
from mlx_flashhead.benchmarks.machine import machine
from mlx_flashhead.common.command import check_writable, command
from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.common.timing import Spread
from mlx_flashhead.index.files import SETTINGS_NAME

QUESTION = "Write a sentence about the moon."
ANOTHER = "Name three rivers of Europe."
TOKENS = 24
TEXT_BEGINS = "=========="
# the next word that is printed, past a terminal's codes
WORD = r"\A(?:\x1b\[[\d;?]*[A-Za-z]|[^\w\x1b])*\w"
SETTLED, BUILD_SECONDS = 2.0, 3600


def program(module: str, *arguments: str) -> pexpect.spawn:
    """A program at a terminal, without its standard error."""
    words = ["-c", 'exec "$0" "$@" 2>/dev/null', sys.executable, "-m", module, *arguments]
    environment = os.environ | {"TERM": "dumb"}
    return pexpect.spawn("sh", words, env=environment, encoding="utf-8", timeout=BUILD_SECONDS)


def seconds_to_text(child: pexpect.spawn, mark: str) -> float:
    """Seconds until a word has been printed after ``mark``."""
    began = time.monotonic()
    child.expect_exact(mark)
    child.expect(WORD)
    return time.monotonic() - began


def generate(module: str, model: str) -> dict[str, float]:
    """One prompt; ours builds afterwards, and a second run has the FlashHead."""
    prompt = ("--model", model, "--prompt", QUESTION, "--max-tokens", str(TOKENS), "--temp", "0")
    began = time.monotonic()
    first = program(module, *prompt)
    times = {"first token": seconds_to_text(first, TEXT_BEGINS)}
    first.expect(pexpect.EOF)
    times["end"] = time.monotonic() - began
    if module.startswith("mlx_flashhead"):
        second = program(module, *prompt)
        times["first token after it"] = times["end"] + seconds_to_text(second, TEXT_BEGINS)
        second.expect(pexpect.EOF)
    return times


def chat(module: str, model: str) -> dict[str, float]:
    """One message at the prompt, and a second one once there is a FlashHead."""
    child = program(module, "--model", model, "--max-tokens", str(TOKENS), "--temp", "0")
    child.expect(".")

    def first_token(question: str) -> float:
        settle(child)
        child.send(f"{question}\r")
        return seconds_to_text(child, "\n")  # which ends the echo

    times = {"first token": first_token(QUESTION)}
    began = time.monotonic() - times["first token"]
    if module.startswith("mlx_flashhead"):
        _wait(lambda: any(Path(os.environ["MLX_FLASHHEAD_HOME"]).rglob(SETTINGS_NAME)))
        times["end"] = time.monotonic() - began
        times["first token after it"] = times["end"] + first_token(ANOTHER)
    child.send("q\r")
    child.expect(pexpect.EOF)
    return times


def settle(child: pexpect.spawn) -> None:
    """Waits until it has printed nothing for a while, as at its prompt."""
    while child.expect([".+", pexpect.TIMEOUT], timeout=SETTLED) == 0:
        pass


def server(module: str, model: str) -> dict[str, float]:
    """One request, and a second one once /health names a FlashHead."""
    with serving(module, "--model", model) as running:

        def first_token(question: str) -> float:
            return ask(running.port, question, max_tokens=TOKENS).first_seconds

        began = time.monotonic()
        times = {"first token": first_token(QUESTION)}
        if module.startswith("mlx_flashhead"):
            before = running.health()["heads"]
            _wait(lambda: running.health()["heads"] != before)
            times["end"] = time.monotonic() - began
            times["first token after it"] = times["end"] + first_token(ANOTHER)
    return times


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
                events = seconds.setdefault(f"{library}.{name}", {})
                for event, taken in times.items():
                    events.setdefault(event, []).append(taken)
                news = ", ".join(f"{event} {taken:.2f} s" for event, taken in times.items())
                print(f"[{number + 1} of {args.rounds}] {library}.{name}: {news}", file=sys.stderr)
    table = new_table(Path(args.model).name, ("program", "until", "median s", "quartiles"), left=2)
    for name, events in seconds.items():
        for event, values in events.items():
            spread = Spread.of(values)
            quartiles = f"{spread.lower:.2f}–{spread.upper:.2f}"
            table.add_row(name, event, f"{spread.median:.2f}", quartiles)
    show(table)
    if args.json:
        figures = {"model": Path(args.model).name, "machine": machine(), "seconds": seconds}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
