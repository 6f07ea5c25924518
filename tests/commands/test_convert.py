"""``convert``: what it prints, mlx-lm's flags, and its errors."""

import json
import re

import mlx.core as mx
import mlx_lm

import mlx_flashhead
from mlx_flashhead.conversion.options import ConvertOptions
from mlx_flashhead.convert import make_parser
from mlx_flashhead.index.files import CONFIG_KEY
from model_folders import write_model

POSITIONS = ("--calibration-positions", 150)


def test_convert_says_what_it_does(run, dense, tmp_path, text):
    target = tmp_path / "model"
    flags = ["--calibration", text, *POSITIONS, "--seed", 2]
    flags += ["-q", "--q-bits", 8, "--head-bits", 16, "--dtype", "bfloat16"]
    flags += ["--cluster-size", 8, "--target-agreement", 0.9]
    code, output, errors = run("convert", "--hf-path", dense, "--mlx-path", target, *flags)
    assert code == 0 and "Reading" in errors and "Fitting" in errors
    assert output.startswith(f"Loading {dense}\n") and output.endswith(f"\nWriting {target}\n")
    assert "held-out positions: bytes and perplexity relative to" in output
    model, _, config = mlx_flashhead.load(str(target), return_config=True)
    entry = config[CONFIG_KEY]
    assert entry["cluster_size"] == 8
    assert entry["calibration"] == {"source": "file", "positions": 150, "seed": 2}
    assert config["quantization"]["bits"] == 8
    rows = mlx_flashhead.get_flash_head(model).clustered.rows
    assert (rows.quantized, rows.weight.dtype) == (False, mx.bfloat16)
    mlx_lm.load(str(target))


def test_every_option_has_a_flag_with_the_default_of_python():
    shown = " ".join(make_parser().format_help().split())
    assert "(default: mlx_model)" in shown and "(default: 0.998)" in shown
    assert vars(make_parser().parse_args(["--model", "m"])) == vars(ConvertOptions("m"))
    words = (
        "--model m --mlx-path p -q --q-group-size 32 --q-bits 4 --q-mode affine --quant-predicate "
        "mixed_4_6 --dtype float16 --upload-repo me/tiny --trust-remote-code --overwrite"
    )
    parsed = vars(make_parser().parse_args(words.split()))
    # The order of these is that of mlx_lm.convert.
    in_order = ("m", "p", True, 32, 4, "affine", "float16", "me/tiny")
    assert ConvertOptions(**parsed) == ConvertOptions(
        *in_order,
        quant_predicate="mixed_4_6",
        trust_remote_code=True,
        overwrite=True,
    )


def test_a_quantized_model_has_a_head_of_8_bits_and_what_4_would_cost_is_said(run, dense, tmp_path):
    target = tmp_path / "model"
    words = (
        "convert",
        "--model",
        dense,
        "--mlx-path",
        target,
        "-q",
        "--calibration-positions",
        150,
    )
    code, output, _ = run(*words)
    assert code == 0 and re.search(r"^  8 bits.* ms", output, re.MULTILINE)
    entry = json.loads((target / "config.json").read_text())
    rows = entry[CONFIG_KEY]["report"]["head_bits"]["rows"]
    four, eight, floats = rows
    assert entry["quantization"]["bits"] == 4 and [row["bits"] for row in rows] == [4, 8, 32]
    assert floats["kl"] < eight["kl"] < four["kl"] and floats["agreement"] == 1
    assert four["bytes"] < eight["bytes"] < floats["bytes"]
    assert f"| 8 bits | {eight['kl']:.4f} |" in (target / "README.md").read_text()
    code, output, _ = run(*words, "--head-bits", 16, "--overwrite")
    assert code == 0 and "bits" not in output
    head = mlx_flashhead.get_flash_head(mlx_flashhead.load(str(target))[0])
    assert not head.clustered.rows.quantized


def test_what_happens_to_a_text_that_is_cut_short_and_to_tied_rows_is_said(run, tmp_path):
    source = write_model(tmp_path / "source", tied=True)
    short = ("--calibration-seconds", "1e-9", "--calibration-positions", 4000, "--head-bits", 8)
    code, output, _ = run("convert", "--model", source, "--mlx-path", tmp_path / "model", *short)
    assert code == 0 and "or with more --calibration-seconds, is faster" in output
    assert "tied" in output and "both get 8 bits" in output
