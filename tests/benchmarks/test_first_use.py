"""The benchmark of a model's first use: its stages, and that the second use builds nothing."""

from functools import partial

from mlx_flashhead.benchmarks import first_use
from mlx_flashhead.benchmarks.machine import machine
from mlx_flashhead.benchmarks.output import print_result
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import build
from model_folders import write_model

BUILDING = {"given text", "written text", "clustering", "centroids", "report", "writing"}
ALWAYS = {"loading", "installing", "first token", "other"}


def test_stages(tmp_path, monkeypatch, capsys):
    """In this process, and with few positions."""
    monkeypatch.setattr(first_use, "_alone", lambda *arguments: first_use._use(*arguments))
    monkeypatch.setattr(build, "IndexOptions", partial(IndexOptions, calibration_positions=100))
    monkeypatch.setenv("COLUMNS", "80")
    one = first_use.first_use_benchmark(str(write_model(tmp_path / "model")))
    assert (one["model"], one["n_clusters"]) == ("model", 17)
    assert one["seconds"].keys() == BUILDING | ALWAYS | {"total"}
    assert one["again"].keys() == ALWAYS | {"total"}
    print_result({"kind": "first-use", "machine": machine(), "results": [one]})
    assert "First use of model" in capsys.readouterr().out
