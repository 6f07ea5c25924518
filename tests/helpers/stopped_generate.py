"""Runs ``generate`` many times, in forks of one process, each stopped at a moment of its own.

The moments of a run are counted: each piece of text that is printed, each step of the build, and
each change in the folder of the kept FlashHeads.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import build

# not the function of the same name, which the package has under it
command = importlib.import_module("mlx_flashhead.generate")
CHECKOUT = Path(__file__).parents[2]
TEXT, STEP, FILE = "text", "step", "file"
FILES = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "tempfile.mkdtemp")


class Generate:
    """The process, and its runs.

    Args:
        folder: Where the homes lie.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        words = [sys.executable, __file__]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # a fork is short
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(words, env=environment, **pipes)

    def __call__(self, name: str, *arguments, kind=TEXT, moment=0, number=0, delay=0.0):
        """A run with the home of a name.

        Args:
            name: The name.
            *arguments: Of ``generate``.
            kind: A kind of moments.
            moment: The one of that kind at which the run sends itself a signal; 0: none.
            number: The signal.
            delay: Seconds from the moment to the signal.

        Returns:
            ``(exit code or -signal, standard output, standard error)``.
        """
        run = {
            "arguments": list(map(str, arguments)),
            "home": str(self._folder / name),
            "kind": kind,
            "moment": moment,
            "number": number,
            "delay": delay,
        }
        print(json.dumps(run), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, *(
            (self._folder / f"{name}.{stream}").read_text(errors="replace")
            for stream in ("out", "err")
        )

    def moments(self, name: str) -> dict[str, int]:
        """How many moments of each kind the last run of a home has had."""
        return json.loads((self._folder / f"{name}.moments").read_text())

    def seconds_since_signal(self, name: str) -> float:
        """Seconds since the last run of a home has sent itself its signal."""
        return time.time() - (self._folder / f"{name}.sent").stat().st_mtime

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def generate(
    arguments: list[str], home: str, kind: str, moment: int, number: int, delay: float
) -> int:
    """A run in this process. Returns its exit code."""

    moments = Counter()

    def reached(of_kind: str) -> None:
        moments[of_kind] += 1
        Path(f"{home}.moments").write_text(json.dumps(moments))
        if of_kind == kind and moments[kind] == moment:
            threading.Timer(delay, send).start() if delay else send()

    def send() -> None:
        Path(f"{home}.sent").touch()
        os.kill(os.getpid(), number)

    def look(event: str, values: tuple) -> None:
        names_file = event in FILES and isinstance(values[0], str | os.PathLike)
        if names_file and str(values[0]).startswith(f"{home}/"):
            reached(FILE)

    def counted(of_kind: str, function: Callable) -> Callable:
        def call(*values):
            reached(of_kind)
            return function(*values)

        return call

    of_index = build.model_index.steps

    def steps(*values, **options):
        inner = of_index(*values, **options)
        step = counted(STEP, inner.__next__)
        try:
            while True:
                yield step()
        except StopIteration as end:
            return end.value
        finally:
            inner.close()

    build.model_index = SimpleNamespace(steps=steps)
    sys.stdout.write = counted(TEXT, sys.stdout.write)
    sys.addaudithook(look)
    os.environ["MLX_FLASHHEAD_HOME"] = home
    sys.argv[1:] = arguments
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def serve() -> None:
    """Reads runs from standard input, and prints how each ended."""
    build.IndexOptions = functools.partial(IndexOptions, calibration_positions=100)
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if not child:
            for number, name in ((1, "out"), (2, "err")):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(f"{run['home']}.{name}", flags), number)
            code = generate(**run)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
