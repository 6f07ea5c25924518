"""Scripts that make figures of the pages: what they measure, on tiny models."""

import json
import sys
from functools import partial

import architectures
import mlx_flashhead
from figures import grid
from model_folders import write_model


def test_the_grid_has_every_case_and_continues(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(grid, "BATCHES", (1, 2))
    convert = partial(mlx_flashhead.convert, calibration="none", progress=False)
    monkeypatch.setattr(mlx_flashhead, "convert", convert)
    folder, file = write_model(tmp_path / "model", hidden_size=128), tmp_path / "grid.json"
    flags = ("--rounds", 2, "--tokens", 3, "--json", file, "--work", tmp_path / "work")
    run(grid, folder, *flags)
    first = json.loads(file.read_text())
    assert {(case["bits"], case["sampler"], case["batch"]) for case in first["cases"]} == {
        (bits, sampler, batch)
        for bits in (32, 4)
        for sampler in ("greedy", "top-p")
        for batch in (1, 2)
    }
    for case in first["cases"]:
        assert case["ratio"]["runs"] == 2 and case["n_probes"] >= 1
        assert case.get("same_text", case["sampler"] == "top-p")
    removed = first["cases"].pop()
    file.write_text(json.dumps(first))
    run(grid, folder, *flags)
    *kept, new = json.loads(file.read_text())["cases"]
    assert kept == first["cases"] and new["batch"] == removed["batch"]


def test_architectures_need_their_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    code, _, errors = run(architectures)
    assert code == 2
    (line,) = errors.splitlines()
    assert "needs mlx_vlm" in line and "pip install 'mlx_flashhead[vlm]'" in line
