"""scripts/growth.py and scripts/plots.py: the points that are measured, and that they are drawn."""

import json
import sys

import pytest

import growth
import plots
from mlx_flashhead.benchmarks.model import DENSE, FLASH_HEAD, NO_HEAD

USUAL = {"vocab_size": 320, "hidden_size": 64, "n_probes": 4, "n_positions": 1}
AXES = {
    "vocab_size": (160, 320),
    "hidden_size": (32, 64),
    "n_probes": (1, 4, 20),
    "n_positions": (1, 3),
}


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A folder with figures as `growth.py` writes them, of tiny heads."""
    monkeypatch.setattr(growth, "USUAL", USUAL)
    monkeypatch.setattr(growth, "AXES", AXES)
    run(growth, monkeypatch, "--json", tmp_path / "growth.json", "--rounds", 1)
    return tmp_path


def test_each_axis_varies_alone(figures):
    found = json.loads((figures / "growth.json").read_text())
    assert found["kind"] == "growth" and found["machine"]["processor"]
    names = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "n_probes": "n_probes"}
    names["n_positions"] = "positions"
    for axis, values in AXES.items():
        points = [one for one in found["results"] if one["axis"] == axis]
        assert [one[names[axis]] for one in points] == list(values)
        for other, key in names.items():
            if other != axis:
                assert {one[key] for one in points} == {USUAL[other]}
    by_probes = [one["read_mb"] for one in found["results"] if one["axis"] == "n_probes"]
    step = 16 * 64 * 4 / 1e6  # a cluster's rows
    assert by_probes[1] - by_probes[0] == pytest.approx(3 * step)


def test_plots_of_all_kinds(figures, tmp_path, monkeypatch, capsys):
    grown = json.loads((figures / "growth.json").read_text())
    heads = [one | {"name": "tiny"} for one in grown["results"][:2]]
    speeds = {form: {"median": 1.0} for form in (DENSE, FLASH_HEAD, NO_HEAD)}
    decoded = [{"model": "tiny", "sampler": "greedy", "batch": 1, "tokens_per_second": speeds}]
    for kind, results in {"head": heads, "model": decoded, "estimate": []}.items():
        written = {"kind": kind, "machine": grown["machine"], "results": results}
        (figures / f"some-{kind}.json").write_text(json.dumps(written))
    run(plots, monkeypatch, "--figures", figures, "--docs", tmp_path / "docs")
    drawn = sorted((tmp_path / "docs").iterdir())
    assert [file.name for file in drawn] == ["growth.png", "some-head.png", "some-model.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    assert capsys.readouterr().out.splitlines() == [str(file) for file in drawn]


def test_plots_need_figures(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(plots, monkeypatch, "--figures", tmp_path)
    assert end.value.code == 2 and "no figures here" in capsys.readouterr().err


def test_the_figures_of_the_pages_can_be_drawn(monkeypatch, tmp_path):
    run(plots, monkeypatch, "--docs", tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert {"growth.png", "head.png", "model.png", "model-gemma3.png"} <= drawn
    assert all((plots.CHECKOUT / "docs" / name).exists() for name in drawn)
