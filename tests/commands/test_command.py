"""How commands end."""

import importlib

import pytest


@pytest.mark.parametrize(
    "command", ["generate", "chat", "convert", "export", "evaluate", "benchmark"]
)
@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
        (BrokenPipeError(), 141, ""),
        (ValueError("One sentence.\nAnd a second line."), 2, "error: One sentence.\n"),
        (ValueError("No \x1b[31mname\x07\x9b."), 2, "error: No [31mname.\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (OSError("No disk."), 2, "error: No disk.\n"),
    ],
)
def test_how_commands_end(run, monkeypatch, command, error, code, said):
    def parser(*_):
        raise error

    module = importlib.import_module(f"mlx_flashhead.{command}")
    monkeypatch.setattr(module, "make_parser", parser)
    assert run(command) == (code, "", said)
