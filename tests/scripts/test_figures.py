"""Scripts that make figures of the pages: what they measure, on tiny models."""

import json
import sys
from functools import partial

import architectures
from figures import first_use, grid
from mlx_flashhead import get_flash_head, load
from mlx_flashhead.loading import first_build as build
from model_folders import write_model


def test_the_grid_has_every_case_with_the_tuned_settings(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(grid, "BATCHES", (1, 2))
    quick = partial(build.IndexOptions, calibration_positions=100)
    monkeypatch.setattr(build, "IndexOptions", quick)

    def tuned(path):
        model, tokenizer = load(path)
        get_flash_head(model).stays_dense = True
        return model, tokenizer

    monkeypatch.setattr(grid, "load", tuned)
    folder, file = write_model(tmp_path / "model", hidden_size=128), tmp_path / "grid.json"
    run(grid, folder, "--rounds", 2, "--tokens", 3, "--json", file)
    figures = json.loads(file.read_text())
    assert (figures["complete"], figures["command"].split()[0]) == (True, "scripts/figures/grid.py")
    (cases,) = (one["cases"] for one in figures["results"])
    assert {(case["bits"], case["sampler"], case["batch"]) for case in cases} == {
        (bits, sampler, batch)
        for bits in (32, 4)
        for sampler in ("greedy", "top-p")
        for batch in (1, 2)
    }
    for case in cases:
        assert case["stays_dense"] is True and case["n_probes"] >= 1
        assert case["ratio"]["runs"] == 2


def test_the_first_text_after_a_mark():
    """At a terminal, whose echo is not the text."""
    program = first_use.Program("code", "-q")
    program.settle()
    program.type("print('=' * 10); import time; time.sleep(0.5); print('text')")
    began = program.seconds()
    assert program.text_after("==========") - began > 0.4
    program.type("exit()")
    assert program.end() > 0


def test_architectures_need_their_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    code, _, errors = run(architectures)
    assert code == 2
    (line,) = errors.splitlines()
    assert "needs mlx_vlm" in line and "pip install 'mlx_flashhead[vlm]'" in line
