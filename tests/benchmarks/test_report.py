"""The report of a benchmark: its rounds, and what is checked before them."""

import argparse

import pytest

from mlx_flashhead.benchmarks import report as module
from mlx_flashhead.benchmarks.report import report
from mlx_flashhead.benchmarks.rounds import Round
from mlx_flashhead.common.tables import new_table


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(
        kind="any", json=str(tmp_path / "out.json"), plot=str(tmp_path / "out.png"), report=False
    )


def make_table(result):
    table = new_table(None, ("figure",))
    table.add_row(f"figure {result['value']}")
    return table


def bars(result):
    return "title", "label", result


def rounds():
    """Rounds with growing figures."""
    yield Round(0, 4, "ready", [])
    yield Round(1, 4, "warm", [])
    for value in (2, 3):
        yield Round(value, 4, f"round of {value}", [{"value": value}])


def test_rounds_are_printed_as_they_come_with_the_time_that_is_left(arguments, monkeypatch, capsys):
    clock = iter((100, 110, 120, 130))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock, 130))
    report(arguments, rounds(), make_table, bars)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "[4 rounds] ready",
        "[1 of 4, 30 s left] warm",
        "[2 of 4, 20 s left] round of 2",
        "[3 of 4, 10 s left] round of 3",
    ]
    assert "figure 3" in shown.out


def test_nothing_is_reported_before_the_first_figure(arguments, capsys, tmp_path):
    def stopped_at_once():
        yield Round(0, 4, "ready", [])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(arguments, stopped_at_once(), make_table, bars)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
