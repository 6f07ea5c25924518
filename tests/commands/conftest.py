"""Runs the commands in this process, on a tiny model."""

import importlib
import signal
import sys

import pytest

import mlx_flashhead
from model_folders import write_model

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command: → (exit code, standard output, standard error)."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(command, *arguments):
        argv = [f"mlx_flashhead.{command}", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        code = 0
        try:
            importlib.import_module(f"mlx_flashhead.{command}").main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(run):
    """A function that runs a command which must end with one sentence, and returns that."""

    def refused(command, *arguments):
        code, _, errors = run(command, *arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("error: ") and errors.rstrip().endswith((".", ")"))
        return errors.rstrip()

    return refused


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model's folder, not converted."""
    return write_model(tmp_path_factory.mktemp("dense") / "model", tied=False, hidden_size=128)


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    """The folder of the same model with a FlashHead of 4 probes."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    mlx_flashhead.convert(str(dense), str(folder), n_probes=4, calibration="none", progress=False)
    return folder


@pytest.fixture
def text(tmp_path):
    """A text to calibrate or to measure on."""
    file = tmp_path / "text.txt"
    file.write_text("The bridge over the river was old, and nobody knew who had built it. " * 4)
    return file
