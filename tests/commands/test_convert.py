"""``convert``: what it prints, mlx-lm's flags, and its errors."""

import json
from dataclasses import fields

import mlx.core as mx
import mlx_lm

import mlx_flashhead
from mlx_flashhead.conversion.options import ConvertOptions
from mlx_flashhead.convert import make_parser
from mlx_flashhead.index.files import CONFIG_KEY
from model_folders import write_model


def test_convert_says_what_it_does(run, dense, tmp_path, text):
    target = tmp_path / "model"
    code, output, errors = run(
        "convert", "--hf-path", dense, "--mlx-path", target, "--calibration", text, "-q",
        "--q-bits", 8, "--head-bits", 16, "--cluster-size", 8, "--target-agreement", 0.9,
        "--calibration-positions", 150, "--seed", 2, "--dtype", "bfloat16",
    )  # fmt: skip
    assert code == 0
    assert output.splitlines()[0] == f"Loading {dense}"
    assert output.splitlines()[-1] == f"Writing {target}"
    assert "held-out positions: bytes and perplexity relative to" in output
    assert "Reading" in errors and "Fitting" in errors
    model, _, config = mlx_flashhead.load(str(target), return_config=True)
    entry = config[CONFIG_KEY]
    assert entry["cluster_size"] == 8
    assert entry["calibration"] == {"source": "file", "positions": 150, "seed": 2}
    assert config["quantization"]["bits"] == 8
    rows = mlx_flashhead.get_flash_head(model).clustered.rows
    assert (rows.quantized, rows.weight.dtype) == (False, mx.bfloat16)
    mlx_lm.load(str(target))


def test_every_option_has_a_flag_with_the_default_of_python(monkeypatch):
    assert vars(make_parser().parse_args(["--model", "m"])) == vars(ConvertOptions("m"))
    words = (
        "--model m --mlx-path p -q --q-group-size 32 --q-bits 4 --q-mode mxfp4 --quant-predicate "
        "mixed_4_6 --dtype float16 --upload-repo me/tiny --trust-remote-code --overwrite"
    )
    assert ConvertOptions(**vars(make_parser().parse_args(words.split()))) == ConvertOptions(
        "m", "p", True, 32, 4, "mxfp4", "float16", "me/tiny", quant_predicate="mixed_4_6",
        trust_remote_code=True, overwrite=True,
    )  # fmt: skip


def test_the_help_has_every_option_and_its_default(run):
    code, output, _ = run("convert", "--help")
    shown = " ".join(output.split())
    assert code == 0 and "(default: mlx_model)" in shown and "(default: 0.998)" in shown
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in fields(ConvertOptions))


def test_a_quantized_model_has_a_head_of_8_bits_and_what_4_would_cost_is_said(run, dense, tmp_path):
    target, positions = tmp_path / "model", ("--calibration-positions", 150)
    code, output, _ = run("convert", "--model", dense, "--mlx-path", target, "-q", *positions)
    assert code == 0
    entry = json.loads((target / "config.json").read_text())
    compared = entry[CONFIG_KEY]["report"]["head_bits"]
    four, eight, floats = compared["rows"]
    assert [row["bits"] for row in compared["rows"]] == [4, 8, 32]
    assert entry["quantization"]["bits"] == 4
    assert floats["kl"] < eight["kl"] < four["kl"] and floats["agreement"] == 1
    assert four["bytes"] < eight["bytes"] < floats["bytes"]
    lines = output.splitlines()
    assert any(line.startswith("  8 bits") and " ms" in line for line in lines)
    assert f"| 8 bits | {eight['kl']:.4f} |" in (target / "README.md").read_text()
    again = run("convert", "--model", dense, "--mlx-path", target, "-q", "--head-bits", 16,
                "--overwrite", *positions)  # fmt: skip
    assert again[0] == 0 and "bits" not in again[1]
    assert not mlx_flashhead.get_flash_head(
        mlx_flashhead.load(str(target))[0]
    ).clustered.rows.quantized


def test_a_text_that_is_cut_short_names_the_flag(run, dense, tmp_path):
    short = ("--calibration-seconds", "1e-9", "--calibration-positions", 4000)
    code, output, _ = run("convert", "--model", dense, "--mlx-path", tmp_path / "model", *short)
    assert code == 0 and "or with more --calibration-seconds, is faster" in output


def test_convert_says_that_tied_rows_change_together(run, tmp_path):
    source = write_model(tmp_path / "source", tied=True)
    arguments = ("--model", source, "--mlx-path", tmp_path / "x", "--calibration", "none")
    code, output, _ = run("convert", *arguments, "--head-bits", 8)
    assert code == 0 and "tied" in output and "both get 8 bits" in output
