"""``convert``: what it prints, mlx-lm's flags, and what it refuses."""

import importlib
from dataclasses import fields

import mlx.core as mx
import mlx_lm

import mlx_flashhead
from mlx_flashhead.conversion.options import ConvertOptions
from mlx_flashhead.index.files import CONFIG_KEY
from model_folders import write_model

# not the function of the same name, which the package has under it
convert_command = importlib.import_module("mlx_flashhead.convert")


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
    assert "held-out positions: how often the proposed token is not the dense" in output
    assert "Reading" in errors and "Fitting" in errors
    model, _, config = mlx_flashhead.load(str(target), return_config=True)
    entry = config[CONFIG_KEY]
    assert entry["cluster_size"] == 8
    assert entry["calibration"] == {"source": "file", "positions": 150, "seed": 2}
    assert config["quantization"]["bits"] == 8
    rows = mlx_flashhead.get_flash_head(model).clustered.rows
    assert (rows.quantized, rows.weight.dtype) == (False, mx.bfloat16)
    mlx_lm.load(str(target))


def test_convert_passes_every_flag_of_mlx_lms_and_has_the_defaults_of_python(run, monkeypatch):
    given = {}
    monkeypatch.setattr(convert_command, "convert", lambda **options: given.update(options))
    run(
        "convert", "--model", "m", "--mlx-path", "p", "-q", "--q-group-size", 32, "--q-bits", 4,
        "--q-mode", "mxfp4", "--quant-predicate", "mixed_4_6", "--dtype", "float16",
        "--upload-repo", "me/tiny", "--trust-remote-code", "--overwrite",
    )  # fmt: skip
    assert ConvertOptions(**given) == ConvertOptions(
        hf_path="m", mlx_path="p", quantize=True, q_group_size=32, q_bits=4, q_mode="mxfp4",
        dtype="float16", upload_repo="me/tiny", quant_predicate="mixed_4_6",
        trust_remote_code=True, overwrite=True,
    )  # fmt: skip
    run("convert", "--model", "m")
    assert given.keys() == {one.name for one in fields(ConvertOptions)}
    assert ConvertOptions(**given) == ConvertOptions(hf_path="m")


def test_convert_says_that_tied_rows_change_together(run, tmp_path):
    source = write_model(tmp_path / "source", tied=True)
    arguments = ("--model", source, "--mlx-path", tmp_path / "x", "--calibration", "none")
    code, output, _ = run("convert", *arguments, "--head-bits", 8)
    assert code == 0 and "tied" in output and "both get 8 bits" in output
