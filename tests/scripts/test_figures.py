"""Scripts that make figures of the pages: what they measure, on tiny models."""

import itertools
import json
import sys
from functools import partial

import pytest

import apple_estimates
import architectures
import finer_heads
import grid
import mlx_flashhead
from model_folders import write_model


@pytest.fixture
def measure(run, tmp_path, monkeypatch):
    """A function that runs a script: (script, marker of its block, flags) → figures, its page."""
    convert = partial(mlx_flashhead.convert, calibration="none", progress=False)
    monkeypatch.setattr(mlx_flashhead, "convert", convert)
    folder = write_model(tmp_path / "model", hidden_size=128)
    file, page = tmp_path / "figures.json", tmp_path / "page.md"

    def measure(script, marker, *flags):
        monkeypatch.setattr(script, "PAGE", page)
        page.write_text(f"<!-- {marker} -->\n<!-- end of {marker} -->\n")
        flags = ("--json", file, "--work", tmp_path / "work", "--rounds", 1, *flags)
        assert run(script, folder, *flags)[0] == 0
        return json.loads(file.read_text()), page.read_text()

    measure.file = file
    return measure


def test_the_grid_has_every_case_and_continues(measure, monkeypatch):
    monkeypatch.setattr(grid, "BATCHES", (1, 2))
    first, _ = measure(grid, "grid", "--tokens", 2)
    cases = {(case["bits"], case["sampler"], case["batch"]) for case in first["cases"]}
    assert cases == {*itertools.product((32, 4), ("greedy", "top-p"), (1, 2))}
    for case in first["cases"]:
        assert case["ratio"]["runs"] == 1 and case["n_probes"] >= 1
        assert case.get("same_text", case["sampler"] == "top-p")
    removed = first["cases"].pop()
    measure.file.write_text(json.dumps(first))
    second, page = measure(grid, "grid", "--tokens", 2)
    *others, new = second["cases"]
    assert others == first["cases"] and new["batch"] == removed["batch"]
    lines = page.splitlines()
    assert len(lines) == 6 and f" {new['ratio']['median']:.2f} |" in lines[4]


def test_a_finer_head_is_nearer_to_the_model_as_it_is(measure):
    flags = ("--positions", 100, "--quality", "--speed", "--tokens", 2)
    figures, page = measure(finer_heads, "heads", *flags)
    by_form, speeds = figures["quality"]["model"], figures["speed"]["model"]
    assert by_form["unquantized"]["kl"] == 0 and by_form["unquantized"]["same"] == 1
    assert 0 < by_form["8"]["kl"] < by_form["4"]["kl"]
    assert by_form["4"]["head_mb"] * 2 / 0.5625 == pytest.approx(by_form["16"]["head_mb"])
    assert {name.split(",")[0] for name in speeds} == {"4", "6", "8", "16"} and len(speeds) == 8
    assert f"{speeds['8, tuned']['tokens_per_second']:.1f} |" in page


@pytest.mark.parametrize("key", ["tokens_per_second", "chip"])
def test_public_speeds_that_are_left_out_are_estimated(key):
    errors = abs(apple_estimates.left_out(key))
    assert len(errors) >= 70 and sorted(errors)[len(errors) // 2] <= 0.12


def test_the_pages_have_the_estimates():
    for (name, marker), lines in apple_estimates.BLOCKS.items():
        text = (apple_estimates.CHECKOUT / name).read_text(encoding="utf-8")
        assert apple_estimates.with_block(text, marker, lines()) == text, name


def test_architectures_need_their_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    code, _, errors = run(architectures)
    assert (code, errors.count("\n")) == (2, 1)
    assert "needs mlx_vlm" in errors and "pip install 'mlx_flashhead[vlm]'" in errors
