"""``benchmark estimate``: the tables, the file, and what is refused."""

import argparse
import json

import pytest

from mlx_flashhead.benchmarks.estimate import add_parser, run
from mlx_flashhead.index.files import FILE_NAME
from model_folders import VOCAB_SIZE, write_model


@pytest.fixture
def estimate(monkeypatch, capsys):
    """A function that runs the command with some arguments and returns what it prints."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="what"))

    def estimate(*arguments):
        capsys.readouterr()
        run(parser.parse_args(["estimate", *map(str, arguments)]))
        return capsys.readouterr().out

    return estimate


def test_a_checkpoint(estimate, converted, tmp_path):
    file = tmp_path / "out.json"
    output = estimate("--model", converted, "--chip", "m3-max", "--json", file)
    assert max(len(line) for line in output.splitlines()) <= 80
    assert output.startswith("ESTIMATE: model on m3-max")
    for part in (
        "AN ESTIMATE, NOT A MEASUREMENT",
        "as stored",
        "16-bit",
        "8-bit",
        "4-bit",
        "4 clusters of 16 rows, of 17 clusters",
        "head  = ",
        "issue 4521",
        "issue 4509",
        "311 GB/s, of a peak of 400",
        "Llama-3.2-1B on m5-max",
    ):
        assert part in output
    figures = json.loads(file.read_text())
    assert (figures["kind"], figures["measured"]) == ("estimate", False)
    assert (figures["chip"], figures["peak_gb_s"]) == ("m3-max", 400)
    assert figures["bandwidth_gb_s"] == pytest.approx(400 * 478 / 614)
    assert figures["model"]["vocab_size"] == VOCAB_SIZE
    assert figures["constants"]["launch"]["value"] == 2.75
    assert all(c["source"] for c in figures["constants"].values())
    assert len(figures["estimates"]) == 10
    # the table shows the figures that the file has
    dense, flash = figures["estimates"][:2]
    assert (dense["form"], flash["form"]) == ("dense", "FlashHead")
    assert f"{dense['model_ms']:.2f}" in output and f"{flash['head_ms']:.3f}" in output
    assert f"{dense['model_ms'] / flash['model_ms']:.2f}x" in output
    public = figures["public_measurements"][0]
    assert public["measured_ms"] == pytest.approx(1000 / public["tokens_per_second"])
    assert public["error"] == pytest.approx(public["estimated_ms"] / public["measured_ms"] - 1)
    assert f"{100 * public['error']:+.0f} %" in output


def test_a_model_without_flash_head(estimate, dense):
    output = estimate("--model", dense, "--chip", "M1", "--n-probes", 3)
    assert "3 clusters of 16 rows, of 17 clusters" in output
    assert "on m1," in output


def test_a_shape(estimate):
    output = estimate("--shape", "gemma-3-270m", "--chip", "M5 Max")
    assert "Gemma-3-270M on m5-max" in output
    assert "256 clusters of 16 rows, of 16384 clusters" in output
    assert "as stored" not in output


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--shape", "smollm2", "--chip", "m4-ultra"), "Unknown chip 'm4-ultra': choose one of m1"),
        (("--shape", "smollm2", "--chip", "m5-ultra"), "Unknown chip 'm5-ultra': choose one of m1"),
        (("--shape", "llama", "--chip", "m1"), "no shape 'llama': choose one of llama-3.2-1b"),
        (("--shape", "smollm2", "--chip", "m1", "--n-probes", "3073"), "choose 1 to 3072"),
        (("--shape", "smollm2", "--chip", "m1", "--json", "./absent/x"), "--json ./absent/x"),
        (("--model", "./absent", "--chip", "m1"), "There is no folder ./absent"),
    ],
)
def test_what_is_refused(estimate, arguments, said):
    with pytest.raises(ValueError, match=said) as told:
        estimate(*arguments)
    assert "\n" not in str(told.value)


def test_a_damaged_checkpoint_is_refused(estimate, tmp_path):
    folder = write_model(tmp_path / "model", further={"flash_head": {"version": 99}})
    (folder / FILE_NAME).touch()
    with pytest.raises(ValueError, match="has version 99"):
        estimate("--model", folder, "--chip", "m1")


def test_model_or_shape(estimate, capsys):
    for arguments in (("--chip", "m1"), ("--chip", "m1", "--shape", "smollm2", "--model", "x")):
        with pytest.raises(SystemExit):
            estimate(*arguments)
        assert "--model" in capsys.readouterr().err
