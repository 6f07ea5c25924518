"""``evaluate``: the tables and the files."""

import json

from model_folders import VOCAB_SIZE

N_CLUSTERS = -(-VOCAB_SIZE // 16)


def test_evaluate_prints_and_writes(run, converted, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, errors = run(
        "evaluate", "text", "--model", converted, "--text", text, "--probes", f"2,4,{N_CLUSTERS}",
        "--positions", 100, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png",
    )  # fmt: skip
    assert code == 0 and "Warning" not in errors
    assert max(map(len, output.splitlines())) <= 80 and "100 positions" in output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["positions"] == 100 and figures["n_clusters"] == N_CLUSTERS
    few, _, all_of_them = figures["rows"]
    assert few["agreement"] < all_of_them["agreement"] == 1
    # the table shows the figures that the file has
    assert f"{100 * few['agreement']:.2f} %" in output
    assert f"{100 * few['bytes_share']:.1f} %" in output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
