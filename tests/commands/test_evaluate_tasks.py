"""``evaluate tasks``: the table, the file, and what is refused before the work."""

import json
import re

import pytest

from local_tasks import CHOICE, GENERATE, PERPLEXITY, write_tasks


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "local")


@pytest.fixture
def arguments(converted, task_folder):
    return ("--model", converted, "--include-path", task_folder)


def test_tasks_are_printed_and_written(run, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "out.json"
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


@pytest.mark.parametrize(
    "further, said",
    [
        (("--n-probes", "18"), "17"),
        (("--num-shots", -1), "--num-shots is -1: give a whole number of 0"),
        (("--max-tokens", 0), "--max-tokens is 0: give a whole number of 1"),
        (("--top-p", 7), "--top-p is 7: give 0 to 1"),
        (("--chat-template-args", "[1]"), "give a JSON object such as"),
        (("--include-path", "absent"), "there is no such folder"),
        (("--json", "absent/out.json"), "cannot be written"),
    ],
)
def test_refused_arguments(refused, arguments, further, said):
    assert said in refused("evaluate", "tasks", *arguments, "--tasks", CHOICE, *further)
