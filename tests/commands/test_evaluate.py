"""``evaluate``: the tables and the files."""

import json
import re

import pytest

from local_tasks import CHOICE, GENERATE, PERPLEXITY, write_tasks
from mlx_flashhead.evaluation import answers
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


def test_evaluate_answers(run, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(answers, "usual_requests", lambda: ["Who?", "Name a river."])
    code, output, _ = run(
        "evaluate", "answers", "--model", converted, "--probes", f"1,{N_CLUSTERS}",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0
    assert max(len(line) for line in output.splitlines()) <= 80
    assert "2 requests through the chat template, at most 100 tokens" in " ".join(output.split())
    few, every = json.loads((tmp_path / "out.json").read_text())["measures"]
    assert f"{100 * few['identical']:.1f} %" in output
    assert f"{100 * few['agreement']:.2f} %" in output
    assert (every["identical"], every["median_parting"]) == (1, None)


def test_tasks_are_printed_and_written(run, refused, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file, tasks = tmp_path / "out.json", write_tasks(tmp_path / "tasks")
    arguments = ("--model", converted, "--include-path", tasks)
    code, output, errors = run(
        "evaluate", "tasks", *arguments, "--tasks", f"{CHOICE},{GENERATE}", PERPLEXITY,
        "--json", file, "--n-probes", 17, "--limit", 2, "--num-shots", 1,
        "--output-dir", tmp_path / "new",
    )  # fmt: skip
    assert code == 0, errors
    assert "Traceback" not in errors
    assert max(len(line) for line in output.splitlines()) <= 80
    assert "batch_generate" not in output and "batch_generate" in errors
    results = json.loads(file.read_text())["results"]
    assert [(r["task"], r["head"], r["metric"]) for r in results] == [
        (CHOICE, "dense", "acc"),
        (GENERATE, "FlashHead", "exact_match"),
        (PERPLEXITY, "dense", "byte_perplexity"),
        (PERPLEXITY, "dense", "bits_per_byte"),
        (PERPLEXITY, "FlashHead", "byte_perplexity"),
        (PERPLEXITY, "FlashHead", "bits_per_byte"),
    ]
    # the table shows the figures that the file has
    for result in results:
        (line,) = (
            line
            for line in output.splitlines()
            if f"{result['head']} " in line and f"{result['metric']} " in line
        )
        assert f"{result['value']:.4f}" in line
    assert "approximation" in output
    assert {result["samples"] for result in results} == {2}
    # all clusters were scored
    assert results[4]["value"] == pytest.approx(results[2]["value"], rel=1e-5)
    (written,) = (tmp_path / "new").iterdir()
    assert re.fullmatch(f"eval_.*_01_{CHOICE}_{GENERATE}_{PERPLEXITY}", written.name)
    tasks = json.loads(written.read_text())
    assert tasks[CHOICE]["acc,none"] == results[0]["value"]
    assert tasks[PERPLEXITY]["byte_perplexity,none"] == results[2]["value"]
    assert "17" in refused("evaluate", "tasks", *arguments, "--tasks", CHOICE, "--n-probes", 18)
