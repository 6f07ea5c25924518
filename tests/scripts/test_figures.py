"""Scripts that make figures of the pages: what they measure, on tiny models."""

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


def test_the_grid_has_every_case_and_continues(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(grid, "BATCHES", (1, 2))
    monkeypatch.setattr(grid, "PAGE", tmp_path / "page.md")
    grid.PAGE.write_text("<!-- grid -->\n<!-- end of grid -->\n")
    convert = partial(mlx_flashhead.convert, calibration="none", progress=False)
    monkeypatch.setattr(mlx_flashhead, "convert", convert)
    folder, file = write_model(tmp_path / "model", hidden_size=128), tmp_path / "grid.json"
    flags = ("--rounds", 1, "--tokens", 2, "--json", file, "--work", tmp_path / "work")
    run(grid, folder, *flags)
    first = json.loads(file.read_text())
    assert {(case["bits"], case["sampler"], case["batch"]) for case in first["cases"]} == {
        (bits, sampler, batch)
        for bits in (32, 4)
        for sampler in ("greedy", "top-p")
        for batch in (1, 2)
    }
    for case in first["cases"]:
        assert case["ratio"]["runs"] == 1 and case["n_probes"] >= 1
        assert case.get("same_text", case["sampler"] == "top-p")
    removed = first["cases"].pop()
    file.write_text(json.dumps(first))
    run(grid, folder, *flags)
    *others, new = json.loads(file.read_text())["cases"]
    assert others == first["cases"] and new["batch"] == removed["batch"]
    lines = grid.PAGE.read_text().splitlines()
    assert len(lines) == 6 and f" {new['ratio']['median']:.2f} |" in lines[4]


@pytest.mark.parametrize("key", ["tokens_per_second", "chip"])
def test_public_speeds_that_are_left_out_are_estimated(key):
    errors = abs(apple_estimates.left_out(key))
    assert len(errors) >= 70 and sorted(errors)[len(errors) // 2] <= 0.12


def test_the_pages_have_the_estimates():
    for (name, marker), lines in apple_estimates.BLOCKS.items():
        page = apple_estimates.CHECKOUT / name
        if page.exists():
            text = page.read_text(encoding="utf-8")
            assert apple_estimates.with_block(text, marker, lines()) == text, name
    assert apple_estimates.with_block("<!-- a -->\nb\n<!-- end of a -->", "a", ["c"]) == (
        "<!-- a -->\nc\n<!-- end of a -->"
    )


def test_a_finer_head_is_nearer_to_the_model_as_it_is(run, tmp_path, monkeypatch):
    monkeypatch.setattr(finer_heads, "PAGE", tmp_path / "page.md")
    convert = partial(mlx_flashhead.convert, calibration="none", progress=False)
    monkeypatch.setattr(mlx_flashhead, "convert", convert)
    folder, file = write_model(tmp_path / "model", hidden_size=128), tmp_path / "heads.json"
    finer_heads.PAGE.write_text("<!-- heads -->\n<!-- end of heads -->\n")
    flags = ("--json", file, "--positions", 100, "--work", tmp_path / "work", "--rounds", 1)
    assert run(finer_heads, folder, *flags, "--quality")[0] == 0
    assert run(finer_heads, folder, *flags, "--speed", "--tokens", 2)[0] == 0
    figures = json.loads(file.read_text())
    by_form, speeds = figures["quality"]["model"], figures["speed"]["model"]
    assert by_form["unquantized"]["kl"] == 0 and by_form["unquantized"]["same"] == 1
    assert 0 < by_form["8"]["kl"] < by_form["4"]["kl"]
    assert by_form["4"]["head_mb"] * 2 / 0.5625 == pytest.approx(by_form["16"]["head_mb"])
    assert {name.split(",")[0] for name in speeds} == {"4", "6", "8", "16"} and len(speeds) == 8
    assert f"{speeds['8, tuned']['tokens_per_second']:.1f} |" in finer_heads.PAGE.read_text()


def test_architectures_need_their_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    code, _, errors = run(architectures)
    assert code == 2
    (line,) = errors.splitlines()
    assert "needs mlx_vlm" in line and "pip install 'mlx_flashhead[vlm]'" in line
