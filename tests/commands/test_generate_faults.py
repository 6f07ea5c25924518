"""``generate`` is stopped while it reads, answers and builds: nothing is lost."""

import signal
import subprocess
import sys
import time

import pytest

from mlx_flashhead.loading import cached as cache
from model_folders import write_model

RULE = "==========\n"
# It sends itself a signal at a moment: a word of its bars, or an event in the home.
STOPPED = """
import os, sys
from functools import partial
from mlx_flashhead.loading import build_parts
moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
place, write = os.environ["MLX_FLASHHEAD_HOME"] + "/flash_heads/", sys.stderr.write

def stop_if(reached):
    if reached:
        os.kill(os.getpid(), number)

sys.stdout.isatty = lambda: True  # a script's answer builds nothing
build_parts.IndexOptions = partial(build_parts.IndexOptions, calibration_positions=100)
sys.stderr.write = lambda text: stop_if(moment in text) or write(text)
sys.addaudithook(lambda event, values: stop_if(event == moment and place in str(values[0])))
from mlx_flashhead.generate import main
main()
"""
BAR = "FlashHead:   0%"
MOMENTS = [(BAR, signal.SIGKILL), (BAR, signal.SIGINT), ("os.rename", signal.SIGKILL)]


def test_stopped_at_three_moments(run, quick, tmp_path, flash_head_home, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    model = write_model(tmp_path / "model")
    words = ("--model", model, "--prompt", "One day", "--max-tokens", 8)
    text = run("generate", *words, "--dense")[1].split(RULE)[1]
    for moment, number in MOMENTS:
        command = [sys.executable, "-c", STOPPED, moment, int(number), *words]
        ended = subprocess.run([*map(str, command)], capture_output=True, text=True)
        output = ended.stdout
        errors = ended.stderr
        assert output.split(RULE)[1] == text and "Traceback" not in errors
        if number == signal.SIGINT:
            assert ended.returncode == 0, errors
            assert "Its build goes on next time." in errors
        else:
            assert ended.returncode == -number, errors
            assert "Its build goes on next time." not in errors
        assert cache.entries() == []
    code, output, errors = run("generate", *words)
    assert code == 0 and output.split(RULE)[1] == text and "FlashHead is ready" in errors
    assert len(cache.entries()) == 1
    assert "FlashHead: " in run("generate", *words)[1]


def test_a_script_does_not_wait_for_a_build(run, tmp_path):
    model = write_model(tmp_path / "model")
    code, output, errors = run("generate", "--model", model, "--prompt", "One", "--max-tokens", 4)
    assert code == 0 and "Generation: 4 tokens" in output and cache.entries() == []
    said = f"FlashHead is not built yet: `mlx_flashhead.cache --build {model}` builds it"
    assert errors.startswith(said) and errors.count("\n") == 1


@pytest.mark.newest
def test_a_signal_during_a_long_prompt_ends_it_before_the_answer(tmp_path):
    """One call of MLX reads it, for which Python's own handlers wait."""
    further = {"max_position_embeddings": 100_000}
    model = write_model(tmp_path / "long", hidden_size=256, further=further)
    words = ("-m", "mlx_flashhead.generate", "--model", model, "--prefill-step-size", "8192")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    words = (sys.executable, "-u", *words, "--prompt", "x" * 6000)
    with subprocess.Popen(words, text=True, **pipes) as process:
        assert process.stdout.readline() == RULE
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130 and output.strip() == ""
    assert "Traceback" not in errors and errors.endswith("\nInterrupted.\n")
