"""``device_lines.py``: which places ask for the device, and what no test runs."""

import pytest

import device_lines
from device_lines import NOT_RUN, PACKAGE, Place, questions, unrun

SOURCE = """
def asks():
    if mx.default_device().type == mx.cpu:
        return 1

    def inner():
        return backend == METAL

    return inner


def asks_nothing():
    return default_device
"""


def test_places_that_ask(tmp_path, monkeypatch):
    (tmp_path / "any.py").write_text(SOURCE)
    monkeypatch.setattr(device_lines, "PACKAGE", tmp_path)
    found = {place: (lines.start, lines.stop) for place, lines in questions()}
    assert found == {Place("any.py", 3): (2, 10), Place("any.py", 7): (6, 8)}


def test_a_line_that_one_of_the_runs_has_run_is_run(tmp_path, monkeypatch):
    class Run:
        def __init__(self, *missing):
            self._missing = missing

        def analysis2(self, _):
            return None, None, None, self._missing, None

    assert unrun([Run(3, 4, 7), Run(4, 7, 9)], "any.py") == {Place("any.py", 4), Place("any.py", 7)}


@pytest.mark.parametrize("file, text", NOT_RUN)
def test_what_has_a_reason_is_there(file, text):
    lines = (PACKAGE / file).read_text(encoding="utf-8").splitlines()
    assert text in map(str.strip, lines)
