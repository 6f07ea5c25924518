"""Runs programs under ``mlx_flashhead.run``, as a user does, and as they are."""

import contextlib
import importlib
import json
import runpy
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

DENSE = "Without FlashHead: "
# A program that runs others, one after the other: the imports of a process take seconds.
MANY = """
import importlib
import runpy
import sys

for line in sys.argv[1:]:
    for stream in (sys.stdout, sys.stderr):
        print("\\n==", line, file=stream, flush=True)
    words = line.split()
    if words[0] == "-m":
        sys.argv = words[1:]
        if words[1].startswith("mlx_lm."):
            importlib.import_module(words[1]).main()
        else:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
"""


def alone(capsys, place: Path, *words: str) -> str:
    """What a program prints without ``run``, in this process: a file, or a module of mlx-lm."""
    capsys.readouterr()
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words])
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            importlib.import_module(words[0]).main()
    return capsys.readouterr().out


def process(place: Path, *words, **options) -> subprocess.Popen:
    """A module of Python in a folder."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True, **options)


def start(place: Path, *words, typed: str = "") -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``mlx_flashhead.run`` in a folder."""
    pipes = dict.fromkeys(("stdin", "stderr"), subprocess.PIPE)
    program = process(place, "mlx_flashhead.run", *words, **pipes)
    output, errors = program.communicate(typed)
    return program.returncode, output, errors


def start_many(place: Path, *words, typed: str = "", code: int = 0) -> list[tuple[str, str]]:
    """(standard output, standard error) of each program that ``many.py`` runs in a process.

    The process ends with the code.
    """
    ended, *streams = start(place, *words, typed=typed)
    assert ended == code, streams[1]
    parts = [stream.split("\n== ")[1:] for stream in streams]
    return [
        tuple(part.partition("\n")[2] for part in program) for program in zip(*parts, strict=True)
    ]


class RunningServer:
    """A server of another package, and what it has ``said``."""

    def __init__(self, port: int):
        self.port = port
        self.said = ""

    def ask(self, content, **body) -> str:
        """Its answer to a question."""
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": content}]
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]


@contextlib.contextmanager
def running_server(
    place: Path, *words, ready: str, under: tuple = ("mlx_flashhead.run", "--flash-head", "head")
) -> Iterator[RunningServer]:
    """A server that runs ``under`` another program, from its line ``ready`` on until Ctrl-C."""
    # The port behind 0 is not printed, so a free one is chosen.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = RunningServer(port)
    words = (*under, *words, "--port", port)
    with process(place, *words, stderr=subprocess.STDOUT) as program:
        try:
            while ready not in server.said:
                line = program.stdout.readline()
                assert line, server.said
                server.said += line
            yield server
        finally:
            program.send_signal(signal.SIGINT)
            server.said += program.communicate(timeout=120)[0]
