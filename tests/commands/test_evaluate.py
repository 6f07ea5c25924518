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
    assert code == 0
    assert "Warning" not in errors
    assert max(len(line) for line in output.splitlines()) <= 80
    assert "100 positions" in output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["positions"] == 100 and figures["n_clusters"] == N_CLUSTERS
    rows = {row["n_probes"]: row for row in figures["rows"]}
    assert len(rows) == 3
    # the table shows the figures that the file has
    few = rows[2]
    assert few["agreement"] < 1
    assert f"{100 * few['agreement']:.2f} %" in output
    assert f"{100 * few['bytes_share']:.1f} %" in output
    assert rows[N_CLUSTERS]["agreement"] == 1
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
