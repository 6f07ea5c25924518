"""``evaluate``: the table, the files, and what is refused before the work."""

import json

import pytest

from mlx_flashhead import evaluate as evaluate_command
from mlx_flashhead.evaluation import answers, structured
from model_folders import VOCAB_SIZE

N_CLUSTERS = -(-VOCAB_SIZE // 16)


def test_evaluate_prints_and_writes(run, converted, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, errors = run(
        "evaluate", "--model", converted, "--text", text, "--probes", f"2,4,{N_CLUSTERS}",
        "--positions", 100, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png",
    )  # fmt: skip
    assert code == 0
    assert "Warning" not in errors
    assert max(len(line) for line in output.splitlines()) <= 80
    for word in ("100 positions", "FlashHead", "unit means", "agreement ", "coverage ", "drawn "):
        assert word in output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["positions"] == 100 and figures["n_clusters"] == N_CLUSTERS
    rows = {(row["routing"], row["n_probes"]): row for row in figures["rows"]}
    assert len(rows) == 6
    # the table shows the figures that the file has
    few = rows["FlashHead", 2]
    assert few["agreement"] < 1
    assert (
        f"{100 * few['agreement']:.2f} %" in output
        and f"{100 * few['bytes_share']:.1f} %" in output
    )
    assert rows["FlashHead", N_CLUSTERS]["agreement"] == 1
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_precisions(run, converted, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = run(
        "evaluate", "--model", converted, "--text", text, "--precisions",
        "--positions", 50, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0
    assert max(len(line) for line in output.splitlines()) <= 80
    for word in ("50 positions", "32-bit dense head", "FlashHead", "agreement ", "bytes "):
        assert word in output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [(m["head"], m["bits"], m["n_probes"]) for m in figures["measures"]] == [
        (head, bits, p)
        for head, p in (("dense", None), ("FlashHead", 4))
        for bits in (32, 16, 8, 4)
    ]
    # the table shows the figures that the file has
    reference, last = figures["measures"][0], figures["measures"][-1]
    assert f"{100 * last['agreement']:.2f} %" in output and f"{last['kl']:.5f}" in output
    assert f"{last['perplexity'] / reference['perplexity']:.4f}" in output
    assert f"{100 * last['bytes_share']:.1f} %" in output


def test_evaluate_answers(run, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(answers, "requests", lambda: ["Who?", "Name a river."])
    code, output, _ = run(
        "evaluate", "--model", converted, "--answers", "--probes", f"1,{N_CLUSTERS}",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0
    assert max(len(line) for line in output.splitlines()) <= 80
    assert "2 requests through the chat template, at most 100 tokens" in " ".join(output.split())
    figures = json.loads((tmp_path / "out.json").read_text())
    few, every = figures["measures"]
    assert f"{100 * few['identical']:.1f} %" in output and f"{few['nats_per_token']:+.4f}" in output
    assert (every["identical"], every["median_parting"]) == (1, None)
    for other in ("--text", "--masks", "--precisions"):
        refused = (other, "text.txt") if other == "--text" else (other,)
        code, _, errors = run("evaluate", "--model", converted, "--answers", *refused)
        assert code == 2
        assert "--answers is by itself" in errors


def test_evaluate_precisions_at_other_probes(run, converted, text, tmp_path):
    file = tmp_path / "out.json"
    arguments = ("--model", converted, "--text", text, "--precisions", "--probes", "2,9")
    assert run("evaluate", *arguments, "--positions", 20, "--json", file)[0] == 0
    assert {m["n_probes"] for m in json.loads(file.read_text())["measures"]} == {None, 2, 9}


def test_evaluate_structured(run, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cases = [{"request": "Colour?", "schema": {"enum": ["red", "green"]}}]
    monkeypatch.setattr(structured, "usual_cases", lambda: cases)
    code, output, _ = run(
        "evaluate", "--model", converted, "--structured", "--json", tmp_path / "out.json"
    )
    assert code == 0
    assert max(len(line) for line in output.splitlines()) <= 80
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["answers"] == figures["valid"] == 1 + structured.SAMPLED
    assert "8 of 8" in output and "1 of 1" in output
    assert f"mask takes {figures['mask_us']['median']:.0f} µs" in " ".join(output.split())


def test_evaluate_masks(run, converted, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = run(
        "evaluate", "--model", converted, "--text", text, "--masks",
        "--positions", 30, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0
    assert max(len(line) for line in output.splitlines()) <= 80
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["positions"] == 30
    for choice in figures["choices"]:
        (line,) = (line for line in output.splitlines() if choice["change"] in line)
        assert (
            f"{100 * choice['estimates']:.2f} %" in line
            and f"{100 * choice['exact']:.2f} %" in line
        )


@pytest.mark.parametrize(
    "option, name, said",
    [
        ("--plot", "out.xyz", "must end in .png"),
        ("--plot", "out", "must end in .png"),
        ("--plot", "absent/out.png", "cannot be written"),
        ("--json", "absent/out.json", "cannot be written"),
        ("--json", ".", "cannot be written"),
    ],
)
def test_evaluate_checks_its_outputs_first(
    refused, converted, text, tmp_path, monkeypatch, option, name, said
):
    def load(*_, **__):
        raise AssertionError("the outputs come first")

    monkeypatch.setattr(evaluate_command, "load", load)
    arguments = ("--model", converted, "--text", text, option, tmp_path / name)
    line = refused("evaluate", *arguments)
    assert said in line and option in line
    assert list(tmp_path.iterdir()) == [text]


def test_evaluate_leaves_outputs_alone_until_it_has_them(refused, text, tmp_path):
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        refused("evaluate", "--model", "./absent", "--text", text, "--json", tmp_path / name)
    assert (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--probes", "0"), "whole numbers of 1 or more"),
        (("--probes", f"2,{N_CLUSTERS + 1}"), f"1 to {N_CLUSTERS}"),
        (("--probes", "many"), "give whole numbers of 1 or more such as"),
        (("--probes", ","), "give whole numbers of 1 or more such as"),
        (("--positions", 0), "--positions is 0"),
        (("--seed", -1), "--seed is -1"),
        (("--precisions", "--plot", "out.png"), "leave it out with --precisions"),
        (("--structured",), "leave --text out"),
        (("--structured", "--answers"), "is by itself"),
        (("--masks", "--plot", "out.png"), "leave it out with --masks"),
        (("--masks", "--probes", "9"), "--masks goes alone"),
        (("--precisions", "--probes", "99"), f"1 to {N_CLUSTERS}"),
    ],
)
def test_evaluate_refuses_arguments(refused, converted, text, arguments, said):
    assert said in refused("evaluate", "--model", converted, "--text", text, *arguments)


@pytest.mark.parametrize(
    "content, said",
    [(b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"a", "too short"), (None, "cannot be read")],
)
def test_evaluate_refuses_texts(refused, converted, tmp_path, content, said):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    arguments = ("--model", converted, "--text", tmp_path / "text.txt")
    assert said in refused("evaluate", *arguments)
