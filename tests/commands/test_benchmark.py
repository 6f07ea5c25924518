"""``benchmark``: tables, files, the report, and what is refused before the work."""

import json
import signal
import subprocess
import sys

import jsonschema
import mlx.core as mx
import pytest

from figures import speed_tables
from mlx_flashhead.benchmarks.kinds import server
from mlx_flashhead.benchmarks.roofline import BANDWIDTH_SHARE
from mlx_flashhead.loading import head_cache as cache
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.locate import find_head
from tiny_models import tiny_index

MACS_SCHEMA = json.loads((speed_tables.MACS / "schema.json").read_text())
HEAD = ("head", "--shape", "320,64", "--n-probes", 3, "--rounds", 1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def check_outputs(run, tmp_path, *arguments):
    """Runs a benchmark with all outputs; returns the screen and the figures."""
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png", "--report")
    code, output, errors = run("benchmark", *arguments, *files)
    assert (code, "Traceback" in errors) == (0, False)
    screen, _, report = output.partition("```json\n")
    assert max(len(line) for line in screen.splitlines()) <= 80
    figures = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(report.removesuffix("\n```\n")) == figures
    assert (figures["kind"], figures["complete"]) == (arguments[0], True)
    assert figures["machine"]["versions"]["mlx"] in screen
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    return screen, figures["results"]


def test_head_of_shapes(run, tmp_path):
    flags = ("--shape", "203,128", "--positions", 2, "--head-bits", 8, "--dtype", "float16")
    screen, results = check_outputs(run, tmp_path, *HEAD, *flags)
    assert [(result["vocab_size"], result["hidden_size"]) for result in results] == [
        (320, 64),
        (203, 128),
    ]
    for result in results:
        settings = [result[name] for name in ("n_probes", "positions", "dtype", "head_bits")]
        assert settings == [3, 2, "float16", 8]
        ms = result["ms"]["FlashHead proposal"]["median"]
        assert f" {ms:.2f} " in screen


def test_head_of_a_model(run, converted, tmp_path):
    _, (result,) = check_outputs(
        run, tmp_path, "head", "--model", converted, "--n-probes", 2, "--rounds", 1
    )
    assert (result["n_probes"], result["hidden_size"], result["name"]) == (2, 128, "model")


def test_model(run, converted, tmp_path):
    screen, results = check_outputs(
        run, tmp_path, "model", "--model", converted, "--n-probes", 2, "--rounds", 1,
        "--tokens", 3, "--batch", 1, "--batch", 2, "--sampler", "greedy",
    )  # fmt: skip
    assert [(result["sampler"], result["batch"]) for result in results] == [
        ("greedy", 1),
        ("greedy", 2),
    ]
    for result in results:
        assert result["n_probes"] == {"FlashHead": 2, "bare FlashHead": 2}
        assert f" {result['times_faster']['FlashHead']:.2f} x" in screen
        assert f" {result['token_ms']['bare FlashHead']['median']:.2f} " in screen


def test_mac(run, converted, tmp_path, monkeypatch):
    """The file fits the schema in all but the machine, which is no Mac."""
    monkeypatch.chdir(tmp_path)
    flags = ("--model", converted, "--rounds", 3, "--tokens", 2)
    code, _, errors = run("benchmark", "mac", *flags)
    (file,) = tmp_path.glob("*-model.json")
    assert code == 0
    figures = json.loads(file.read_text())
    if not mx.metal.is_available():
        assert f"is no Mac with a GPU: {file.name} is not for" in errors
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(figures, MACS_SCHEMA)
        figures["machine"] |= {"system": "Darwin 25", "processor": "Apple M9", "chip": "m9"}
        figures["machine"] |= {"device": "gpu", "gpu": {}}
        for result in figures["results"]:
            result["backend"] = "metal"
    jsonschema.validate(figures, MACS_SCHEMA)
    file.rename(tmp_path / "m9-model.json").write_text(json.dumps(figures))
    lines = list(speed_tables.macs(tmp_path))[2:]
    for line, result in zip(lines, figures["results"], strict=True):
        speeds = result["tokens_per_second"]
        forms = (f"{speeds[form]:.1f}" for form in ("dense", "bare FlashHead", "FlashHead"))
        assert f"| {result['sampler']} | {' | '.join(forms)} | " in line


def test_the_files_of_macs_fit_the_schema():
    for file in speed_tables.MACS.glob("m*.json"):
        jsonschema.validate(json.loads(file.read_text()), MACS_SCHEMA)


def test_server(run, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LENGTHS", (0, 1) * 4)  # the tiny model's context is short
    commands = []

    def recorded(*command, serving=server.serving):
        commands.append(command)
        return serving(*command)

    monkeypatch.setattr(server, "serving", recorded)
    screen, (result,) = check_outputs(
        run, tmp_path, "server", "--model", converted, "--clients", 3, "--requests", 6,
        "--tokens", 4, "--n-probes", 4,
    )  # fmt: skip
    assert [load["server"] for load in result["loads"]] == ["FlashHead", "dense", "mlx_lm.server"]
    for load in result["loads"]:
        assert load["answered"] + load["hung_up"] == 6
        assert load["as_alone"] == load["answered"]
        assert f" {load['tokens_per_second']['median']:.1f} " in screen
    assert "No answer was lost" in screen
    # neither a build nor dense steps are measured
    assert {"--build-first", "--flash-head-always"} <= set(commands[0])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_benchmark_reports_its_rounds(tmp_path, number, code):
    """A real signal, once a round has been counted."""
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ("--shape", "320,64", "--rounds", "100000", "--json", file, "--plot", picture)
    command = [sys.executable, "-m", "mlx_flashhead.benchmark", "head", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        while not process.stderr.readline().startswith("[3 of 100001, "):
            assert process.poll() is None
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (code, False)
    assert "FlashHead full logits" in output and "\nStopped: " in errors
    assert picture.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(file.read_text())
    assert not figures["complete"]
    assert figures["results"][0]["ms"]["FlashHead proposal"]["runs"] >= 2


def test_every_kind_is_listed(run):
    output = run("benchmark", "--help")[1]
    assert all(f"    {name} " in output for name in ("head", "model", "server", "estimate", "mac"))


@pytest.fixture
def estimate(run):
    """A function of flags: the screen of an estimate."""

    def estimate(*arguments):
        code, output, _ = run("benchmark", "estimate", *arguments)
        assert code == 0
        return output

    return estimate


def test_estimate_of_a_checkpoint(estimate, converted, tmp_path):
    file = tmp_path / "out.json"
    output = estimate("--model", converted, "--chip", "m3-max", "--json", file)
    assert max(len(line) for line in output.splitlines()) <= 80
    assert output.startswith("ESTIMATE: model on m3-max")
    figures = json.loads(file.read_text())
    assert (figures["kind"], figures["measured"]) == ("estimate", False)
    assert figures["bandwidth_gb_s"] == pytest.approx(400 * BANDWIDTH_SHARE)
    dense, flash = figures["estimates"][:2]
    assert (dense["form"], flash["form"]) == ("dense", "FlashHead")
    errors = [100 * speed["error"] for speed in figures["public_speeds"]]
    for part in (
        "AN ESTIMATE, NOT A MEASUREMENT",
        "as stored",
        "4 clusters of 16 rows, of 17 clusters",
        "353 GB/s, of 400 by Apple",
        "None of them is of m3-max",
        # the figures that the file has
        f"{dense['model_ms']:.2f}",
        f"{flash['head_ms']:.3f}",
        f"{dense['model_ms'] / flash['model_ms']:.2f}x",
        f"by {min(errors):+.0f} % to {max(errors):+.0f} %",
    ):
        assert part in " ".join(output.split())


def test_estimate_of_a_model_has_the_clusters_of_its_kept_flash_head(estimate, dense):
    model = ("--model", dense, "--chip", "M1")
    assert "17 clusters of 16 rows, of 17 clusters" in estimate(*model)
    assert "3 clusters" in estimate(*model, "--n-probes", 3)
    rows = find_head(load_dense(dense)[0]).rows()
    index = tiny_index(load_dense(dense)[0], cluster_size=8, n_probes=7)
    cache.keep(index, cache.place_of(rows))
    assert "7 clusters of 8 rows, of 33 clusters" in estimate(*model)


def test_estimate_of_a_shape(estimate):
    output = estimate("--shape", "gemma-3-270m", "--chip", "M5 Max")
    assert "Gemma-3-270M on m5-max" in output and "as stored" not in output
    assert "968 clusters of 16 rows, of 16384 clusters\n" in output
    # the public speeds of the chip, with the estimate's error
    (line,) = (line for line in output.splitlines() if line.startswith(" SmolLM2-135M "))
    assert "711.54" in line and line.rstrip().endswith(" %")
    assert "(assumed)" in estimate("--shape", "gemma-3-1b", "--chip", "m2")
