"""``generate`` is stopped, or fails, while it answers and while it builds: nothing is lost."""

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

import pytest

import stopped_generate
from mlx_flashhead.index.files import read_index
from mlx_flashhead.loading import background as build
from mlx_flashhead.loading import sources as cache
from model_folders import write_model
from stopped_generate import FILE, STEP, TEXT

generation = importlib.import_module("mlx_flashhead.lossless.generation")
RULE = "==========\n"
N_MOMENTS = {TEXT: 1, STEP: 2, FILE: 2}


@pytest.fixture
def quick(monkeypatch):
    """A build takes a second."""
    options = partial(build.IndexOptions, calibration_positions=100)
    monkeypatch.setattr(build, "IndexOptions", options)


def test_stopped_at_five_moments(run, quick, tmp_path, monkeypatch):
    model, whole, home = (tmp_path / name for name in ("model", "whole", "stopped"))
    write_model(model)
    words = ("--model", model, "--prompt", "One day", "--max-tokens", 8)
    text = run("generate", *words, "--dense")[1].split(RULE)[1]

    def stopped(home, kind=TEXT, moment=0, number=0):
        """The program with a home, stopped: (exit code, output, errors)."""
        command = [sys.executable, stopped_generate.__file__, kind, moment, number, *words]
        monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(home))
        ended = subprocess.run([*map(str, command)], capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr

    for folder in (whole, home):  # so that both write the same
        for name in ("locks", "flash_heads"):
            (folder / name).mkdir(parents=True)
    code, output, errors = stopped(whole)
    assert code == 0 and output.split(RULE)[1] == text and "FlashHead is ready" in errors
    moments = json.loads((tmp_path / "whole.moments").read_text())
    for kind, n in N_MOMENTS.items():
        assert moments[kind] >= n
        for i in range(n):
            number = (signal.SIGKILL, signal.SIGINT)[i % 2]
            at = 1 + i * moments[kind] // n
            code, output, errors = stopped(home, kind, at, int(number))
            assert (RULE + text + RULE).startswith(output[: len(2 * RULE + text)])
            assert "Traceback" not in errors
            if number == signal.SIGKILL:
                assert code == -number
            elif code == 0:
                assert "Skipped. The next answer tries again." in errors
                assert output.split(RULE)[1] == text
            else:
                assert code == 130 and errors.endswith("Interrupted.\n")
                assert "Building" not in errors
            for entry in cache.entries():
                assert read_index(entry.path).config.vocab_size == 258
                shutil.rmtree(entry.path)
    for remains in home.rglob(".*"):
        os.utime(remains, (0, 0))  # a process that begins may not have locked a young one
    code, output, errors = run("generate", *words)
    assert code == 0 and output.split(RULE)[1] == text and "FlashHead is ready" in errors
    assert len(cache.entries()) == 1 and not list(home.rglob(".*"))
    assert "FlashHead: " in run("generate", *words)[1]


@pytest.mark.newest
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_long_prompt_ends_it_before_the_answer(tmp_path, number):
    """One call of MLX reads it, for which Python's own handlers wait."""
    further = {"max_position_embeddings": 100_000}
    model = write_model(tmp_path / "long", hidden_size=256, further=further)
    words = ("-m", "mlx_flashhead.generate", "--model", model, "--prefill-step-size", "8192")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    words = (sys.executable, "-u", *words, "--prompt", "x" * 6000)
    with subprocess.Popen(words, text=True, **pipes) as process:
        assert process.stdout.readline() == RULE
        time.sleep(0.5)
        process.send_signal(number)
        output, errors = process.communicate()
    assert process.returncode == 128 + number and errors.endswith("Interrupted.\n")
    assert output.strip() == "" and "Traceback" not in errors


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", [(cache.files, "write_companion"), (tempfile, "mkdtemp")], ids=str
)
def test_a_full_disk(run, dense, quick, monkeypatch, flash_head_home, where):
    monkeypatch.setattr(*where, full)
    code, output, errors = run("generate", "--model", dense, "--prompt", "One", "--max-tokens", 3)
    assert code == 0 and "Generation: 3 tokens" in output and "Traceback" not in errors
    assert errors.count("It is not kept") == 1 and "No space left on device" in errors
    assert not list(flash_head_home.glob("flash_heads/*"))


def test_a_model_that_is_deleted_meanwhile(run, quick, tmp_path, monkeypatch):
    model, generate = write_model(tmp_path / "model"), generation.generate

    def deleted(*arguments, **options):
        shutil.rmtree(model)
        return generate(*arguments, **options)

    monkeypatch.setattr(generation, "generate", deleted)
    code, output, errors = run("generate", "--model", model, "--max-tokens", 3)
    assert code == 0 and "Generation: 3 tokens" in output and "FlashHead is ready" in errors
    assert len(cache.entries()) == 1
    assert run("generate", "--model", model)[::2] == (
        2, f"error: There is no folder {model}: check the path of the model.\n"
    )  # fmt: skip
