"""What is stored of how a checkpoint was made."""

import hashlib
import shlex

from mlx_flashhead.convert import make_parser
from mlx_flashhead.publishing.recipe import make_recipe

DEFAULTS = {
    "quantize": False, "q_bits": None, "calibration": "self", "seed": 0,
    "upload_repo": None, "private": False, "quant_predicate": None, "head_bits": None,
    "trust_remote_code": False,
}  # fmt: skip


def recipe(revision=None, **arguments):
    return make_recipe(
        DEFAULTS | {"hf_path": "/home/ann/model", "mlx_path": "/home/ann/out"} | arguments,
        DEFAULTS,
        model="maker/Model",
        revision=revision,
        name="Model-FlashHead-4bit",
    )


def test_the_command_is_one_that_the_parser_takes():
    found = recipe(
        revision="abc", quantize=True, q_bits=8, head_bits=16, seed=3, quant_predicate="mixed_4_6",
        upload_repo="me/x", private=True, trust_remote_code=True,
    )  # fmt: skip
    program, *words = shlex.split(found["command"])
    args = make_parser().parse_args(words)
    assert program == "mlx_flashhead.convert"
    assert (args.hf_path, args.revision, args.mlx_path) == (
        "maker/Model",
        "abc",
        "Model-FlashHead-4bit",
    )
    assert (args.quantize, args.q_bits, args.head_bits, args.seed) == (True, 8, 16, 3)
    assert (args.quant_predicate, args.trust_remote_code) == ("mixed_4_6", True)
    assert args.upload is None and args.upload_repo is None and not args.private


def test_defaults_are_left_out_but_the_seed():
    assert recipe()["command"] == (
        "mlx_flashhead.convert --hf-path maker/Model --seed 0 --mlx-path Model-FlashHead-4bit"
    )
    assert "--quant-predicate FUNCTION" in recipe(quant_predicate=lambda *_: True)["command"]


def test_files_are_named_without_their_folders(tmp_path):
    text = tmp_path / "my text.txt"
    text.write_text("calibrate")
    found = recipe(calibration=str(text))
    assert "--calibration 'my text.txt'" in found["command"]
    assert found["files"] == {"my text.txt": hashlib.sha256(b"calibrate").hexdigest()}
    assert str(tmp_path) not in str(found) and "/home/ann" not in str(found)
    assert "files" not in recipe()


def test_versions():
    versions = recipe()["versions"]
    assert list(versions) == ["python", "mlx_flashhead", "mlx", "mlx-lm", "numpy", "transformers"]
    assert all(version[0].isdigit() for version in versions.values())
