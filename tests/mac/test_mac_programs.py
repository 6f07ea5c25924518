"""The commands on an Apple GPU: a model's first use builds, measures and keeps; then the others."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx_lm
import pytest

import mlx_flashhead
from mlx_flashhead import get_flash_head
from mlx_flashhead.common.command import printable
from mlx_flashhead.decoding.measuring import rehearsal, tuning
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.loading import installing
from mlx_flashhead.loading.gain_sentences import speed_text
from mlx_flashhead.wide import trial
from quick_builds import build_quickly

# The oldest environment has no compiler for the emulator.
pytestmark = pytest.mark.newest
PROMPT = "One day"
N_TOKENS = 10
TESTS = Path(__file__).parents[1]
# The pretended GPU and the emulator are there.
PLACES = (TESTS, TESTS / "helpers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the FlashHeads of this module are kept."""
    return tmp_path_factory.mktemp("mac_home")


@pytest.fixture(autouse=True)
def _kept(flash_head_home, home, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(home))


@pytest.fixture(scope="module")
def first(gpu, folder, home):
    """The model that is loaded first, what was said of it, and plain mlx-lm's text."""
    expected = mlx_lm.generate(*mlx_lm.load(str(folder)), PROMPT, max_tokens=N_TOKENS)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FLASHHEAD_HOME", str(home))
        patch.delenv("MLX_FLASHHEAD_TUNING")
        patch.setattr(tuning, "SECONDS", 0.0)
        patch.setattr(tuning, "MAX_PENDING", 4)
        patch.setattr(rehearsal, "CLASSES", (1, 2, 8))
        patch.setattr(trial, "LONG", (30, 60))
        build_quickly(patch)
        patch.setattr(sys, "stderr", said)
        model, tokenizer = mlx_flashhead.load(str(folder), flash_head_always=True)
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, said=said.getvalue(), text=expected, folder=folder
    )


@pytest.fixture
def rehearsed(monkeypatch):
    """The kernels of a model have been tried, so that they need not be again."""
    monkeypatch.setattr(installing, "rehearse", lambda model: None)


def in_a_chat(loaded, question, max_tokens):
    """Plain mlx-lm's answer to a question."""
    messages = [{"role": "user", "content": question}]
    prompt = loaded[1].apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(*loaded, prompt, max_tokens=max_tokens)


def test_the_first_use_builds_tries_the_kernels_and_measures(first):
    head = get_flash_head(first.model)
    assert head.backend == "metal" and head.backend_reason == "MLX computes on an Apple GPU."
    assert "Measuring" in first.said and "instead of its Metal kernels" not in first.said
    policy = policy_of(head)
    assert policy.tuning.gain > 0 and not policy.dense
    loaded = first.model, first.tokenizer
    assert mlx_flashhead.generate(*loaded, PROMPT, max_tokens=N_TOKENS) == first.text


def test_what_was_measured_is_of_this_gpu(gpu, first, home, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    kept = [json.loads(file.read_text()) for file in home.rglob("*.json")]
    names = [key for each in kept for key in each if ", mlx " in key]
    # One is the speed of its FlashHead, and one the steps of several tokens.
    assert len(names) >= 2
    assert all(key.startswith(f"Apple {gpu.chip}, ") for key in names) or gpu.emulator is None
    code, output, _ = run("cache")
    # A busy machine has measured nothing that is said.
    said = speed_text(policy_of(get_flash_head(first.model)).tuning)
    assert code == 0 and said.split(" (")[0] in output


def test_generate(first, rehearsed, run):
    expected = in_a_chat(mlx_lm.load(str(first.folder)), PROMPT, N_TOKENS)
    flags = ("--model", first.folder, "--prompt", PROMPT, "--max-tokens", N_TOKENS)
    code, output, _ = run("generate", *flags, "--flash-head-always")
    assert code == 0 and output.split("==========")[1].strip() == expected.strip()
    assert "clusters a token" in output


def test_chat(first, rehearsed, run, monkeypatch):
    expected = in_a_chat(mlx_lm.load(str(first.folder)), "Hello", N_TOKENS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    flags = ("--model", first.folder, "--max-tokens", N_TOKENS)
    code, output, errors = run("chat", *flags, "--flash-head-always")
    assert code == 0 and "Traceback" not in errors
    assert printable(expected).strip() in output


def test_a_benchmark_names_the_gpu(gpu, run, tmp_path):
    report = tmp_path / "report.json"
    flags = ("--shape", "320,256", "--n-probes", 2, "--rounds", 1, "--report", report)
    code, _, errors = run("benchmark", "head", *flags)
    assert code == 0, errors
    figures = json.loads(report.read_text())
    assert figures["machine"]["device"] == "gpu"
    assert figures["machine"]["gpu"]["device_name"] == f"Apple {gpu.chip}" or gpu.emulator is None
    assert figures["results"][0]["backend"] == "metal"


def test_a_program_of_mlx_lm(gpu, first, tmp_path):
    """In a process of its own, with the FlashHead that is kept."""
    program = ["mlx_lm.generate", "--model", str(first.folder), "--prompt", PROMPT, "--temp", "0"]
    if gpu.emulator is not None:
        program = ["pretended_gpu", gpu.chip, *program]
    command = [sys.executable, "-m", "mlx_flashhead.run", "--check", "-m", *program]
    done = subprocess.run(
        [*command, "--max-tokens", str(N_TOKENS)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, *PLACES)))},
    )
    expected = in_a_chat(mlx_lm.load(str(first.folder)), PROMPT, N_TOKENS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("==========")[1].strip() == expected.strip()
    assert "verified" in done.stderr
