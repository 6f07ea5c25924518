"""scripts/soak.py: a moment of it on a tiny model, and that it says what went wrong."""

import sys
from itertools import chain, repeat

import pytest

import soak
from mlx_flashhead import convert
from mlx_flashhead.benchmarks.clients import Reply
from model_folders import write_model


def test_a_moment_of_it(tmp_path, monkeypatch, capsys):
    dense = write_model(tmp_path / "dense", tied=False)
    convert(str(dense), str(tmp_path / "flash"), calibration="none", n_probes=4, progress=False)
    monkeypatch.setattr(soak, "TOPICS", ("a",))
    monkeypatch.setattr(soak, "FORMS", ("{}", "b{}"))
    monkeypatch.setattr(soak, "KINDS", {"sound": 5, "nonsense": 3, "too long": 1, "hangs up": 1})
    arguments = ["--model", str(tmp_path / "flash"), "--minutes", "0.03", "--clients", "2"]
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    soak.main()
    said = capsys.readouterr().out
    assert "| sound: as alone |" in said
    assert "another" not in said and "failed" not in said
    assert "0 tracebacks" in said and "Exit code after SIGTERM: 0." in said


def test_what_is_wrong_is_told():
    tally = soak.Tally(memory=[(0.0, 100.0), (1.0, 200.0)], problems=["sound: 'x' got 'y'"])
    lines = soak.report(tally, "Traceback\n", 1)
    assert lines[-1] == "sound: 'x' got 'y'"
    assert "Log: 1 lines, 1 tracebacks." in lines
    assert "Exit code after SIGTERM: 1." in lines


@pytest.mark.parametrize("answer", [Reply("other text"), ValueError("500")])
def test_a_wrong_answer_is_a_problem(monkeypatch, answer):
    def ask(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(soak, "ask", ask)
    monkeypatch.setattr(soak, "KINDS", dict.fromkeys(soak.KINDS, 0) | {"sound": 1})
    times = chain([0.0], repeat(2.0))
    monkeypatch.setattr(soak.time, "monotonic", lambda: next(times))
    tally = soak.Tally()
    soak.Client(0, {"question": "text"}, tally, 0).run(1.0)
    assert tally.problems
