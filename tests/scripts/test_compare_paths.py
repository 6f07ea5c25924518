"""scripts/compare_paths.py: both paths' tokens, and what it says where they differ."""

import itertools
import sys

import mlx.core as mx
import pytest

import compare_paths
import mlx_flashhead
from compare_paths import Answer, verdict
from kernel_cases import kernels
from mlx_flashhead.head.kernels import MetalSteps
from model_folders import write_model

PROMPTS = ("One day", "def f(")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    write_model(folder / "dense", hidden_size=128)
    how = {"n_probes": 4, "calibration": "none", "progress": False}
    mlx_flashhead.convert(str(folder / "dense"), str(folder / "flash"), **how)
    return str(folder / "flash")


def test_both_paths_give_the_same_tokens(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["compare_paths.py", "--model", checkpoint, "--max-tokens", "6"]
    )
    with kernels() as emulator:
        compare_paths.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(compare_paths.PROMPTS)
    assert all("6 of 6 tokens are the same." in line for line in lines)
    assert emulator is None or emulator.dispatches


def test_a_wrong_kernel_is_told_with_its_place(checkpoint, monkeypatch, capsys):
    """The logit of token 5 is far too high."""
    right, calls = MetalSteps.expand, itertools.count()

    def wrong(self, *arguments):
        logits = right(self, *arguments)
        if next(calls) == 0:  # the kernels' self-check
            return logits
        return mx.concatenate([logits[:, :5], logits[:, 5:6] + 50, logits[:, 6:]], axis=-1)

    monkeypatch.setattr(MetalSteps, "expand", wrong)
    arguments = ["--model", checkpoint, "--max-tokens", "6", "--prompt", "One day"]
    monkeypatch.setattr(sys, "argv", ["compare_paths.py", *arguments])
    with kernels(), pytest.raises(SystemExit) as stopped:
        compare_paths.main()
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "'One day': 1 of 6 tokens are the same, then the paths part." in printed
    assert "no tie" in printed and "metal takes token 5, dense logit" in printed


def test_a_head_on_another_path_is_no_comparison(checkpoint, monkeypatch):
    """Both would run on the same path, and agree whatever the kernels do."""
    monkeypatch.setattr(compare_paths, "BACKEND_VARIABLE", "ANOTHER_VARIABLE")
    with pytest.raises(ValueError, match="asked for"):
        next(compare_paths.compare(checkpoint, PROMPTS, 2))


@pytest.mark.parametrize("gap, agrees", [(1e-4, True), (1e-2, False)])
def test_a_tie_is_no_disagreement(gap, agrees):
    answers = [Answer([1, 2, 3], "abc"), Answer([1, 4, 3], "adc")]
    logits = mx.array([0, 0, 20.0, 0, 20.0 + gap])
    found, said = verdict("p", answers, lambda tokens: logits if tokens == [1] else None)
    assert found == agrees and f"rounding makes 0.0002: {'a' if agrees else 'no'} tie." in said
    assert "1 of 3 tokens are the same, then the paths part. Their logits are" in said
