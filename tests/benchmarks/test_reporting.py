"""The report of a benchmark: its rounds and their times. No time is compared with anything."""

import argparse
import json

import pytest

from mlx_flashhead.benchmarks.reporting import Case, in_turns, spread, write_report
from mlx_flashhead.common.tables import new_table


def make_table(result):
    table = new_table(None, ("", "figure"))
    table.add_row("of a form", f"{result['value']}")
    return table


def cases(seconds):
    """Two cases of one form; the value of each is the number of rounds that counted."""
    for name in ("first", "second"):
        yield Case(name, {"a": seconds}, lambda seconds: {"value": len(seconds["a"])})


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("in_round", [1, 3])
def test_a_stopped_benchmark_reports_the_rounds_that_it_has(capsys, tmp_path, stop, in_round):
    def seconds(number):
        if number == in_round:
            raise stop
        return 0.25

    outputs = {"report": str(tmp_path / "out.json"), "plot": str(tmp_path / "out.png")}
    arguments = argparse.Namespace(rounds=5, **outputs)
    with pytest.raises(type(stop)):
        write_report(arguments, cases(seconds), make_table, subject="any", command="a command")
    shown = capsys.readouterr()
    assert ("of a form" in shown.out) == ("Stopped: " in shown.err) == (in_round > 1)
    if in_round == 1:
        assert list(tmp_path.iterdir()) == []
        return
    figures = json.loads((tmp_path / "out.json").read_text())
    assert not figures["complete"] and figures["results"] == [{"value": 2}]
    assert figures["kind"] == "any" and figures["command"].startswith("a command")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_take_turns_after_a_warm_up_and_figures_are_medians():
    """Each comes first, and each follows every other one; the first round does not count."""
    expected = {"median": 3e3, "lower": 2e3, "upper": 4e3, "runs": 5}
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0], 1000) == expected
    calls = []

    def run(name):
        def seconds(number):
            calls.append((name, number))
            return 10 * number

        return seconds

    for number, seconds in enumerate(in_turns({name: run(name) for name in "ABC"}, 20)):
        assert seconds == {name: [10 * i for i in range(1, number + 1)] for name in "ABC"}
    rounds = ["".join(name for name, number in calls if number == i) for i in range(21)]
    assert [number for _, number in calls] == sorted(number for _, number in calls)
    assert set(rounds) == {"ABC", "ACB", "BAC", "BCA", "CAB", "CBA"}
