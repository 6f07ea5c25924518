"""``generate`` is stopped, or fails, while it answers and while it builds: nothing is lost."""

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

import pytest
from filelock import FileLock

from mlx_flashhead.index.files import read_index
from mlx_flashhead.loading import first_build as build
from mlx_flashhead.loading import head_cache as cache
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.locate import find_head
from model_folders import write_model
from stopped_generate import FILE, STEP, TEXT, Generate

generation = importlib.import_module("mlx_flashhead.lossless.generation")
RULE = "==========\n"
N_MOMENTS = {TEXT: 4, STEP: 6, FILE: 10}
MOST_SECONDS = 2.0  # half a second on a quiet machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def generate(folder):
    return Generate(folder)


@pytest.fixture(scope="module")
def arguments(folder):
    model = write_model(folder / "model")
    return ("--model", model, "--prompt", "One day", "--max-tokens", 8)


@pytest.fixture(scope="module")
def text(generate, arguments):
    """What the dense model writes."""
    return generate("dense", *arguments, "--dense")[1].split(RULE)[1]


def entries_of(home, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(home))
    return cache.entries()


@pytest.mark.newest  # the oldest MLX starts threads when it is imported, which a fork does not have
def test_stopped_at_twenty_moments(generate, arguments, text, folder, monkeypatch):
    for name in ("whole", "stopped"):  # so that both write the same
        for folder_of_home in ("locks", "flash_heads"):
            (folder / name / folder_of_home).mkdir(parents=True)
    code, output, errors = generate("whole", *arguments)
    assert code == 0 and output.split(RULE)[1] == text and "FlashHead is ready" in errors
    all_moments = generate.moments("whole")
    home, (model, _, _) = folder / "stopped", load_dense(folder / "model")
    for kind, n in N_MOMENTS.items():
        assert all_moments[kind] >= n
        for i in range(n):
            number = (signal.SIGKILL, signal.SIGINT)[i % 2]
            at = {"kind": kind, "moment": 1 + i * all_moments[kind] // n}
            code, output, errors = generate(home.name, *arguments, **at, number=number)
            whole = RULE + text + RULE  # after which come the speeds
            assert whole.startswith(output[: len(whole)])
            assert "Traceback" not in errors
            if number == signal.SIGKILL:
                assert code == -number
            elif code == 0:
                assert "Skipped. The next answer tries again" in errors
                assert output.split(RULE)[1] == text
            else:
                assert code == 130 and errors.endswith("Interrupted.\n")
                assert "Building" not in errors
            for entry in entries_of(home, monkeypatch):
                assert read_index(entry.folder).config.vocab_size == 258
                shutil.rmtree(entry.folder)
            lock = home / "locks" / f"{cache.place_of(find_head(model).rows()).name}.lock"
            with FileLock(lock, timeout=0):
                pass
    for remains in home.rglob(".*"):
        os.utime(remains, (0, 0))  # a process that begins may not have locked a young one
    code, output, errors = generate(home.name, *arguments)
    assert code == 0 and output.split(RULE)[1] == text and "FlashHead is ready" in errors
    assert len(entries_of(home, monkeypatch)) == 1 and not list(home.rglob(".*"))
    assert "FlashHead: " in generate(home.name, *arguments)[1]


@pytest.mark.newest
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_long_prompt_ends_it_soon(tmp_path, number):
    """One call of MLX reads it, for which Python's own handlers wait."""
    further = {"max_position_embeddings": 100_000}
    model = write_model(tmp_path / "long", hidden_size=256, further=further)
    words = ("-m", "mlx_flashhead.generate", "--model", model, "--prefill-step-size", "8192")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    words = (sys.executable, "-u", *words, "--prompt", "x" * 6000)
    with subprocess.Popen(words, text=True, **pipes) as process:
        assert process.stdout.readline() == RULE
        time.sleep(1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=MOST_SECONDS)
    assert process.returncode == 128 + number and errors.endswith("Interrupted.\n")
    assert output.strip() == "" and "Traceback" not in errors


@pytest.fixture
def quick(monkeypatch):
    """A build takes a second."""
    options = partial(build.IndexOptions, calibration_positions=100)
    monkeypatch.setattr(build, "IndexOptions", options)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", [(cache, "write_companion"), (tempfile, "mkdtemp")], ids=str)
def test_a_full_disk(run, dense, quick, monkeypatch, flash_head_home, where):
    monkeypatch.setattr(*where, full)
    code, output, errors = run("generate", "--model", dense, "--prompt", "One", "--max-tokens", 3)
    assert code == 0 and "Generation: 3 tokens" in output and "Traceback" not in errors
    assert errors.count("It is not kept") == 1 and "No space left on device" in errors
    assert not list(flash_head_home.glob("flash_heads/*"))
    monkeypatch.undo()


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
