"""Scripts that make figures of the pages: what they measure, on tiny models."""

import itertools
import json
from functools import partial

import pytest

import apple_estimates
import grid
import mlx_flashhead
from model_folders import write_model


def test_the_grid_has_every_case_and_continues(run, tmp_path, monkeypatch):
    convert = partial(mlx_flashhead.convert, calibration="none", progress=False)
    page, file = tmp_path / "page.md", tmp_path / "grid.json"
    for owner, name, value in (
        (mlx_flashhead, "convert", convert),
        (grid, "BATCHES", (1, 2)),
        (grid, "PAGE", page),
    ):
        monkeypatch.setattr(owner, name, value)
    page.write_text("<!-- grid -->\n<!-- end of grid -->\n")
    folder = write_model(tmp_path / "model", hidden_size=128)
    flags = ("--rounds", 1, "--tokens", 2, "--json", file, "--work", tmp_path / "work")
    run(grid, folder, *flags)
    first = json.loads(file.read_text())
    cases = {(case["bits"], case["sampler"], case["batch"]) for case in first["cases"]}
    assert cases == {*itertools.product((32, 4), ("greedy", "top-p"), (1, 2))}
    for case in first["cases"]:
        assert case["ratio"]["runs"] == 1 and case["n_probes"] >= 1
        assert case.get("same_text", case["sampler"] == "top-p")
    removed = first["cases"].pop()
    file.write_text(json.dumps(first))
    run(grid, folder, *flags)
    *others, new = json.loads(file.read_text())["cases"]
    assert others == first["cases"] and new["batch"] == removed["batch"]
    lines = page.read_text().splitlines()
    assert len(lines) == 6 and f" {new['ratio']['median']:.2f} |" in lines[4]


@pytest.mark.parametrize("key", ["tokens_per_second", "chip"])
def test_public_speeds_that_are_left_out_are_estimated(key):
    errors = abs(apple_estimates.left_out(key))
    assert len(errors) >= 70 and sorted(errors)[len(errors) // 2] <= 0.12


def test_the_pages_have_the_estimates():
    for (name, marker), lines in apple_estimates.BLOCKS.items():
        text = (apple_estimates.CHECKOUT / name).read_text(encoding="utf-8")
        assert apple_estimates.with_block(text, marker, lines()) == text, name
