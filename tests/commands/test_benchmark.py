"""``benchmark`` and ``evaluate``: tables, files and the report."""

import json

import pytest

from mlx_flashhead.wide import trial
from model_folders import VOCAB_SIZE

N_CLUSTERS = -(-VOCAB_SIZE // 16)
FEW = ("--n-probes", 2, "--rounds", 1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def check_outputs(run, tmp_path, *arguments):
    """Runs a benchmark with all outputs; returns the screen and the figures."""
    files = ("--report", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    code, screen, errors = run("benchmark", *arguments, *files)
    assert (code, "Traceback" in errors) == (0, False)
    assert max(map(len, screen.splitlines())) <= 80
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["kind"], figures["complete"]) == (arguments[0], True)
    assert figures["machine"]["versions"]["mlx"] in screen
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    return screen, figures["results"]


def test_heads_of_shapes_and_of_a_model(run, converted, tmp_path):
    flags = ("--positions", 2, "--head-bits", 8, "--dtype", "float16")
    screen, results = check_outputs(
        run, tmp_path, "head", "--shape", "320,64", "--shape", "203,128", *FEW, *flags
    )
    shapes = [(result["vocab_size"], result["hidden_size"]) for result in results]
    assert shapes == [(320, 64), (203, 128)]
    for result in results:
        settings = [result[name] for name in ("n_probes", "positions", "dtype", "head_bits")]
        assert settings == [2, 2, "float16", 8]
        assert f" {result['ms']['FlashHead proposal']['median']:.2f} " in screen
    _, (result,) = check_outputs(run, tmp_path, "head", "--model", converted, *FEW)
    assert (result["n_probes"], result["hidden_size"], result["name"]) == (2, 128, "model")


def test_model(run, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "LONG", (60,))
    batches = ("--batch", 1, "--batch", 2)
    flags = ("--model", converted, *FEW, "--tokens", 3, *batches, "--sampler", "greedy")
    screen, results = check_outputs(run, tmp_path, "model", *flags)
    settings = [(result["sampler"], result["batch"]) for result in results]
    assert settings == [("greedy", 1), ("greedy", 2)]
    for result in results:
        assert result["n_probes"] == {"FlashHead": 2, "unverified": 2}
        assert f" {result['times_faster']['FlashHead']:.2f} x" in screen
        assert f" {result['token_ms']['unverified']['median']:.2f} " in screen
    confirmed = json.loads((tmp_path / "out.json").read_text())["confirmed"]
    assert list(confirmed) == ["wide"]
    assert confirmed["wide"]["established"] == [2, 3, 4, 8]
    assert list(confirmed["wide"]["costs"]) == ["2", "3", "4", "8"]


def test_evaluate_prints_and_writes(run, converted, text, tmp_path):
    asked = ("--text", text, "--probes", f"2,4,{N_CLUSTERS}", "--positions", 100)
    written = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    code, output, errors = run("evaluate", "text", "--model", converted, *asked, *written)
    assert code == 0 and "Warning" not in errors
    assert max(map(len, output.splitlines())) <= 80 and "100 positions" in output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["positions"] == 100 and figures["n_clusters"] == N_CLUSTERS
    few, _, all_of_them = figures["rows"]
    assert few["agreement"] < all_of_them["agreement"] == 1
    # The table shows the figures that the file has.
    assert f"{100 * few['agreement']:.2f} %" in output
    assert f"{100 * few['bytes_share']:.1f} %" in output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
