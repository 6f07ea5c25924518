"""Conversion: the same model as mlx-lm's own, an index beside it, and how it was made."""

import hashlib
import inspect
import json
import os
import shlex
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_flashhead
from mlx_flashhead.conversion import pipeline
from mlx_flashhead.conversion.options import ConvertOptions
from mlx_flashhead.conversion.pipeline import check_outside, convert
from mlx_flashhead.conversion.recipe import make_recipe
from mlx_flashhead.convert import make_parser
from mlx_flashhead.index.files import CONFIG_KEY, FILE_NAME, SETTINGS_NAME, read_index
from mlx_flashhead.models.install import get_flash_head
from mlx_flashhead.models.locate import find_head
from mlx_flashhead.models.origin import Origin
from model_folders import VOCAB_SIZE, contents, write_model

QUICK = {"calibration": "none", "progress": False}
N_CLUSTERS = -(-VOCAB_SIZE // 16)


def weights(folder):
    """{name: (dtype, shape, bytes)} of a model folder's weights."""
    files = (mx.load(str(file)).items() for file in folder.glob("model*.safetensors"))
    named = ((name, array) for arrays in files for name, array in arrays)
    return {n: (a.dtype, a.shape, bytes(np.array(a.view(mx.uint8)))) for n, a in named}


def settings(folder):
    """config.json without the FlashHead's entry."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders to convert, by name."""
    folder = tmp_path_factory.mktemp("sources")
    original = {"by_mlx": False, "further": {"torch_dtype": "bfloat16"}}
    options = {
        "tied": {},
        "untied": {"tied": False, "seed": 1},
        "half": {"tied": False, "dtype": mx.bfloat16, "seed": 2},
        "original": original | {"tied": False},
        "original, tied": original | {"dtype": mx.float16, "further": {"torch_dtype": "float16"}},
        # Transformers' newer name of the entry, which mlx-lm does not look at.
        "original, dtype": original | {"further": {"dtype": "bfloat16"}},
        # A folder that MLX has stored keeps its dtype, whatever its config.json says.
        "by mlx": {"further": {"torch_dtype": "bfloat16"}},
    }
    found = {name: write_model(folder / name, **each) for name, each in options.items()}
    quantized = folder / "quantized"
    mlx_lm.convert(str(found["untied"]), str(quantized), quantize=True)
    return found | {"quantized": quantized}


@pytest.mark.parametrize(
    "source, flags",
    [
        *((name, {}) for name in ("tied", "half", "quantized", "original, tied")),
        ("original, dtype", {}),
        ("tied", {"quantize": True}),
        ("untied", {"quantize": True, "q_bits": 8, "q_group_size": 32}),
        ("untied", {"quantize": True, "q_mode": "mxfp4"}),
        ("untied", {"quantize": True, "quant_predicate": "mixed_4_6", "q_group_size": 64}),
        ("half", {"quantize": True, "quant_predicate": lambda path, module: "mlp" in path}),
        ("original", {"quantize": True}),
        ("quantized", {"dequantize": True}),
        ("quantized", {"dtype": "float16"}),
        ("original", {"dtype": "float16"}),
    ],
)
def test_same_model_as_mlx_lms_conversion(sources, tmp_path, source, flags):
    expected = tmp_path / "mlx_lm"
    found = tmp_path / "flash_head"
    own = {}
    predicate = flags.get("quant_predicate")
    if predicate == "mixed_4_6":
        own = {"head_bits": 6}
    elif flags.get("quantize") and not callable(predicate):
        own = {"head_bits": flags.get("q_bits", 4)}
    mlx_lm.convert(str(sources[source]), str(expected), **flags)
    given = convert(str(sources[source]), str(found), n_probes=5, **flags, **own, **QUICK)
    assert weights(found) == weights(expected)
    assert settings(found) == settings(expected)
    assert contents(found).keys() == contents(expected).keys() | {FILE_NAME}
    assert given.eos_token_ids == (1,)
    assert read_index(found).config == given


def test_what_it_wrote_is_loaded_with_and_without_flash_head(sources, tmp_path):
    found = tmp_path / "found"
    convert(str(sources["by mlx"]), str(found), n_probes=5, **QUICK)
    assert weights(found) == weights(sources["by mlx"])
    model, tokenizer = mlx_lm.load(str(found))
    fast, _ = mlx_flashhead.load(str(found))
    head = get_flash_head(fast)
    assert (head.n_probes, head.n_clusters, head.vocab_size) == (5, N_CLUSTERS, VOCAB_SIZE)
    expected = mlx_lm.generate(model, tokenizer, "One day", max_tokens=12)
    assert mlx_flashhead.generate(fast, tokenizer, "One day", max_tokens=12) == expected


def test_a_dequantized_model_may_have_a_quantized_head(sources, tmp_path):
    options = {"dequantize": True, "head_bits": 8}
    convert(str(sources["quantized"]), str(tmp_path / "found"), **options, **QUICK)
    model, _ = mlx_lm.load(str(tmp_path / "found"))
    assert find_head(model).rows().bits == 8
    assert "scales" not in model.layers[0].self_attn.q_proj


def test_the_signature_has_mlx_lms_arguments_in_their_order():
    parameters = list(inspect.signature(convert).parameters)
    expected = list(inspect.signature(mlx_lm.convert).parameters)
    assert parameters[: len(expected)] == expected
    with pytest.raises(TypeError, match="head_bit"):
        convert("model", head_bit=8)


@pytest.mark.parametrize("calibration", ["builtin", "none", "file"])
def test_calibration_and_goals_follow_the_options(sources, tmp_path, capsys, calibration):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a bridge over a river. " * 3)
    options = {"target_agreement": 0.01, "calibration_positions": 100}
    if calibration == "file":
        options["calibration"] = str(text)
    else:
        options["calibration"] = calibration
    files = []
    for seed in (3, 3, 4):
        place = tmp_path / f"found-{len(files)}"
        given = convert(str(sources["tied"]), str(place), seed=seed, **options)
        files.append((place / FILE_NAME).read_bytes())
    assert files[0] == files[1] != files[2]
    positions = 100
    if calibration == "none":
        positions = 0
    assert given.calibration == {"source": calibration, "positions": positions, "seed": 4}
    assert given.report.get("positions", 0) == positions / 4
    assert 1 <= given.n_probes <= N_CLUSTERS
    assert ("to be fastest" in capsys.readouterr().out) == (calibration != "none")


def test_replaces_what_it_wrote_and_nothing_else(tmp_path, sources):
    place = tmp_path / "model"
    convert(str(sources["quantized"]), str(place), **QUICK)
    before = weights(place)
    config = json.loads((place / "config.json").read_text())
    # An older package has written it.
    config[CONFIG_KEY]["version"] = 1
    (place / "config.json").write_text(json.dumps(config))
    convert(str(sources["quantized"]), str(place), cluster_size=8, overwrite=True, **QUICK)
    assert weights(place) == before
    assert read_index(place).config.cluster_size == 8
    assert list(tmp_path.iterdir()) == [place]
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no conversion has written"):
        convert(str(sources["tied"]), str(place), overwrite=True, **QUICK)
    assert weights(place) == before
    assert (place / "notes.txt").exists()


def test_the_model_itself_is_not_written_over(sources, tmp_path, monkeypatch):
    place = tmp_path / "deep" / "model"
    link = tmp_path / "link"
    shutil.copytree(sources["tied"], place)
    link.symlink_to(place)
    before = contents(place)
    for target in (place, place / "new", place.parent, link):
        with pytest.raises(ValueError, match=r"is the folder of the model|was not written by"):
            convert(str(place), str(target), quantize=True, overwrite=True, **QUICK)
    assert contents(place) == before
    # As a bind mount shows one folder at two paths.
    monkeypatch.setattr(os.path, "samefile", lambda *paths: True)
    with pytest.raises(ValueError, match="is the folder of the model itself, or lies in it"):
        check_outside(place, tmp_path)


def test_free_space_is_checked_before_the_work(sources, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(pipeline, "model_index", pytest.fail)
    with pytest.raises(ValueError, match=r"needs \d\.\d MB, but only 0\.1 MB are free there"):
        convert(str(sources["tied"]), str(tmp_path / "found"), **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [None, 16])
def test_a_quantized_model_gets_the_head_of_its_original(sources, tmp_path, bits):
    original = str(sources["untied"])
    place = tmp_path / "finer"
    convert(str(sources["quantized"]), str(place), fine_head=original, head_bits=bits, **QUICK)
    assert get_flash_head(mlx_flashhead.load(str(place))[0]) is not None
    model, _ = mlx_lm.load(str(place))
    rows = find_head(model).rows()
    originals = find_head(mlx_lm.load(original)[0]).rows()
    if bits is None:
        assert rows.bits == 8
        allowed = 0.01
    else:
        assert rows.bits == 0
        allowed = 0.0
    assert mx.abs(rows.dequantized() - originals.weight).max() <= allowed
    assert model.layers[0].self_attn.q_proj.bits == 4


def test_the_index_alone(sources, tmp_path):
    given = convert(str(sources["half"]), str(tmp_path / "head"), index_only=True, **QUICK)
    assert contents(tmp_path / "head").keys() == {FILE_NAME, SETTINGS_NAME, "README.md"}
    assert read_index(tmp_path / "head").config == given
    assert "--index-only" in given.recipe["command"]
    model, _ = mlx_flashhead.load(str(sources["half"]), flash_head=tmp_path / "head")
    assert get_flash_head(model).n_probes == given.n_probes


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"n_probes": N_CLUSTERS + 1}, f"choose 1 to {N_CLUSTERS}"),
        ({"cluster_size": VOCAB_SIZE + 1}, f"at most {VOCAB_SIZE}"),
        ({"cluster_size": 0}, "`cluster_size` is 0"),
        ({"target_agreement": 0.0}, "`target_agreement` is 0.0"),
        ({"calibration_positions": -5}, "`calibration_positions` is -5"),
        ({"head_bits": 3}, "`head_bits` is 3"),
        ({"dtype": "int8"}, "`dtype` is int8"),
        ({"seed": -1}, "`seed` is -1"),
        ({"quantize": True, "dequantize": True}, "either `quantize` or `dequantize`"),
        ({"quantize": True, "quant_predicate": "mixed_4_6", "q_mode": "mxfp4"}, "affine"),
        ({"quantize": True, "q_bits": 7}, "`q_bits` is 7: choose 1, 2, 3, 4, 5, 6 or 8"),
        ({"quantize": True, "q_group_size": 64, "q_mode": "mxfp4"}, "group size|group_size"),
        ({"q_bits": 8}, "`q_bits` is for a quantized model: add `quantize`"),
        ({"quant_predicate": "mixed_4_6"}, "`quant_predicate` is for a quantized model"),
        ({"revision": "main"}, "is a folder, which has no revision 'main'"),
        ({"fine_head": True, "quantize": True}, "`fine_head` is for a model that is quantized"),
        ({"private": True}, "`private` is for an upload: add `upload`"),
        ({"fine_head": True}, "head's rows are floats already: leave `fine_head` out"),
        ({"index_only": True, "quantize": True}, "writes no weights: leave `quantize` out"),
        ({"calibration": "."}, "cannot be read"),
    ],
)
def test_invalid_arguments_write_nothing(sources, tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        convert(str(sources["tied"]), str(tmp_path / "found"), **(QUICK | arguments))
    assert list(tmp_path.iterdir()) == []


def recipe(revision=None, **options):
    given = ConvertOptions(hf_path="/home/ann/model", mlx_path="/home/ann/out", **options)
    return make_recipe(given, Origin("Model", "maker/Model", revision), "Model-4bit")


def test_the_command_makes_the_same_again():
    options = {"quantize": True, "q_bits": 8, "head_bits": 16, "seed": 3}
    options |= {"quant_predicate": "mixed_4_6", "trust_remote_code": True}
    left_out = {"upload_repo": "me/x", "private": True, "overwrite": True, "license": "mit"}
    found = recipe("abc", **left_out, **options)
    program, *words = shlex.split(found["command"])
    again = ConvertOptions(**vars(make_parser().parse_args(words)))
    assert program == "mlx_flashhead.convert"
    assert again == ConvertOptions("maker/Model", "Model-4bit", revision="abc", **options)
    assert " ".join(found["versions"]) == "python mlx_flashhead mlx mlx-lm numpy transformers"


def test_defaults_are_left_out_but_the_seed_and_files_are_named_without_their_folders(tmp_path):
    start = "mlx_flashhead.convert --hf-path maker/Model"
    assert recipe()["command"] == f"{start} --seed 0 --mlx-path Model-4bit"
    command = recipe(quantize=True, quant_predicate=lambda *_: True)["command"]
    assert command.startswith(f"{start} --quantize --quant-predicate FUNCTION --seed")
    text = tmp_path / "my text.txt"
    text.write_text("calibrate")
    found = recipe(calibration=str(text))
    assert "--calibration 'my text.txt'" in found["command"]
    assert found["files"] == {"my text.txt": hashlib.sha256(b"calibrate").hexdigest()}
    assert str(tmp_path) not in str(found)
    assert "/home/ann" not in str(found)
    assert "--fine-head 'my text.txt'" in recipe(fine_head=text)["command"]
    assert "--fine-head a/b" in recipe(fine_head="a/b")["command"]
    assert "files" not in recipe()
