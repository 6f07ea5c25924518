"""The model that is suggested where none is given."""

import builtins
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_flashhead import chat
from mlx_flashhead.common import suggested_model
from mlx_flashhead.common.suggested_model import SUGGESTIONS, asked_for_model, suggested

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    "memory_gb, expected",
    [
        (4, "gemma-3-1b"),
        (8, "gemma-3-4b"),
        (15.6, "Qwen3.5-9B"),
        (24, "9B"),
        (48, "27B"),
        (512, "35B"),
    ],
)
def test_it_goes_by_the_memory(monkeypatch, memory_gb, expected):
    monkeypatch.setattr(suggested_model, "memory_bytes", lambda: int(memory_gb * 2**30))
    found = suggested()
    assert expected in found.model and found.size_gb < 0.65 * max(memory_gb, 8)


def test_the_readme_has_the_same_table():
    shown = re.findall(
        r"^\| (\d+|less) .*`mlx_flashhead.chat --model (\S+?)[ `]", README.read_text(), re.MULTILINE
    )
    shown = [(memory.replace("less", "0"), model) for memory, model in shown]
    assert sorted(shown) == sorted((str(each.memory_gb), each.model) for each in SUGGESTIONS)


@pytest.fixture
def at_a_terminal(monkeypatch):
    """A function that answers the question with a line."""
    monkeypatch.setattr(suggested_model, "memory_bytes", lambda: 16 << 30)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(suggested_model, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))

    def answers(line):
        monkeypatch.setattr(builtins, "input", lambda prompt: line)

    return answers


def test_return_takes_the_suggested_model(at_a_terminal, capsys):
    at_a_terminal("")
    assert asked_for_model() == "mlx-community/Qwen3.5-9B-MLX-4bit"
    assert "For 16 GB of memory" in capsys.readouterr().out
    at_a_terminal(" models/mine ")
    assert asked_for_model() == "models/mine"


def test_a_script_is_not_asked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlx_flashhead.chat"])
    monkeypatch.setattr(suggested_model, "memory_bytes", lambda: 8 << 30)
    monkeypatch.setattr(builtins, "input", None)
    with pytest.raises(SystemExit) as ended:
        chat.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "on this machine for example mlx-community/gemma-3-4b-it-qat-4bit (3 GB)" in said
