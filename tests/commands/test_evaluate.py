"""``evaluate``: the table, the files, and what is refused before the work."""

import json

import pytest

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


@pytest.mark.parametrize(
    "option, name, said",
    [
        ("--plot", "out", "must end in .png"),
        ("--plot", "absent/out.png", "cannot be written"),
        ("--json", "absent/out.json", "cannot be written"),
        ("--json", "old.json", "no folder ./absent"),
        ("--json", "new.json", "no folder ./absent"),
    ],
)
def test_evaluate_checks_its_outputs_first_and_leaves_them_alone(
    refused, text, tmp_path, option, name, said
):
    (tmp_path / "old.json").write_text("old")
    arguments = ("--model", "./absent", "--text", text, option, tmp_path / name)
    assert said in refused("evaluate", "text", *arguments)
    assert {file.name for file in tmp_path.iterdir()} == {text.name, "old.json"}
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--probes", "0"), "whole numbers of 1 or more"),
        (("--probes", f"2,{N_CLUSTERS + 1}"), f"1 to {N_CLUSTERS}"),
        (("--probes", "many"), "give whole numbers of 1 or more such as"),
        (("--positions", 0), "--positions is 0"),
    ],
)
def test_evaluate_refuses_arguments(refused, converted, text, arguments, said):
    assert said in refused("evaluate", "text", "--model", converted, "--text", text, *arguments)


@pytest.mark.parametrize(
    "content, said",
    [(b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"a", "too short"), (None, "cannot be read")],
)
def test_evaluate_refuses_texts(refused, converted, tmp_path, content, said):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    arguments = ("--model", converted, "--text", tmp_path / "text.txt")
    assert said in refused("evaluate", "text", *arguments)
