"""Commands that are refused, and a text."""

import pytest


@pytest.fixture
def refused(run):
    """A function that runs a command which must end with one sentence, and returns that."""

    def refused(command, *arguments):
        code, _, errors = run(command, *arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("error: ") and errors.rstrip().endswith((".", ")", "?"))
        return errors.rstrip()

    return refused


@pytest.fixture
def text(tmp_path):
    """A text to calibrate or to measure on."""
    file = tmp_path / "text.txt"
    file.write_text("The bridge over the river was old, and nobody knew who had built it. " * 4)
    return file
