"""What is stored of how a checkpoint was made."""

import hashlib
import shlex

from mlx_flashhead.conversion.options import ConvertOptions, make_recipe
from mlx_flashhead.convert import make_parser
from mlx_flashhead.models.origin import Origin


def recipe(revision=None, **options):
    given = ConvertOptions(hf_path="/home/ann/model", mlx_path="/home/ann/out", **options)
    return make_recipe(given, Origin("Model", "maker/Model", revision), "Model-4bit")


def test_the_command_makes_the_same_again():
    found = recipe(
        revision="abc", quantize=True, q_bits=8, head_bits=16, seed=3, quant_predicate="mixed_4_6",
        upload_repo="me/x", private=True, trust_remote_code=True, overwrite=True, license="mit",
    )  # fmt: skip
    program, *words = shlex.split(found["command"])
    again = ConvertOptions(**vars(make_parser().parse_args(words)))
    assert program == "mlx_flashhead.convert"
    versions = ["python", "mlx_flashhead", "mlx", "mlx-lm", "numpy", "transformers"]
    assert list(found["versions"]) == versions
    assert again == ConvertOptions(
        hf_path="maker/Model", mlx_path="Model-4bit", revision="abc", quantize=True, q_bits=8,
        head_bits=16, seed=3, quant_predicate="mixed_4_6", trust_remote_code=True,
    )  # fmt: skip


def test_defaults_are_left_out_but_the_seed():
    assert recipe()["command"] == (
        "mlx_flashhead.convert --hf-path maker/Model --seed 0 --mlx-path Model-4bit"
    )
    assert recipe(quantize=True)["command"].startswith(
        "mlx_flashhead.convert --hf-path maker/Model --quantize --seed"
    )
    assert (
        "--quant-predicate FUNCTION"
        in recipe(quantize=True, quant_predicate=lambda *_: True)["command"]
    )


def test_files_are_named_without_their_folders(tmp_path):
    text = tmp_path / "my text.txt"
    text.write_text("calibrate")
    found = recipe(calibration=str(text))
    assert "--calibration 'my text.txt'" in found["command"]
    assert found["files"] == {"my text.txt": hashlib.sha256(b"calibrate").hexdigest()}
    assert str(tmp_path) not in str(found) and "/home/ann" not in str(found)
    assert "files" not in recipe()
