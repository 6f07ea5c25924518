"""Runs ``generate`` many times, in forks of one process, each stopped at a moment of its own.

The moments of a run are counted: each piece of text that is printed, each step of the build, and
each change in the folder of the kept FlashHeads.
"""

import functools
import importlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import background as build

# not the function of the same name, which the package has under it
command = importlib.import_module("mlx_flashhead.generate")
TEXT, STEP, FILE = "text", "step", "file"
FILES = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "tempfile.mkdtemp")


class Generate:
    """The process, and its runs, whose homes lie in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([__name__])
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # a fork is short
        with patch.dict(os.environ, environment):
            self._processes.Process(target=int).start()  # starts the server of forks

    def __call__(self, name: str, *arguments, kind=TEXT, moment=0, number=0):
        """A run with the home of a name: (exit code or -signal, standard output and error).

        At a ``moment`` of a ``kind`` it sends itself the signal of a ``number``.
        """
        home = self._folder / name
        run = (list(map(str, arguments)), str(home), kind, moment, number)
        process = self._processes.Process(target=generate, args=run)
        process.start()
        process.join()
        files = (home.with_name(f"{name}.{stream}") for stream in ("out", "err"))
        return process.exitcode, *(file.read_text(errors="replace") for file in files)

    def moments(self, name: str) -> dict[str, int]:
        """How many moments of each kind the last run of a home has had."""
        return json.loads((self._folder / f"{name}.moments").read_text())


def generate(arguments: list[str], home: str, kind: str, moment: int, number: int) -> None:
    """A run in this process, which ends with it."""
    for descriptor, stream in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(f"{home}.{stream}", flags), descriptor)
    moments = Counter()

    def reached(of_kind: str) -> None:
        moments[of_kind] += 1
        Path(f"{home}.moments").write_text(json.dumps(moments))
        if of_kind == kind and moments[kind] == moment:
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

    of_index = build.model_index

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

    build.IndexOptions = functools.partial(IndexOptions, calibration_positions=100)
    build.model_index = steps
    sys.stdout.write = counted(TEXT, sys.stdout.write)
    sys.addaudithook(look)
    os.environ["MLX_FLASHHEAD_HOME"] = home
    sys.argv[1:] = arguments
    command.main()
