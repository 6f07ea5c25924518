"""Models that cannot be used: one clear sentence, whichever command is asked to load them."""

import json
import shutil

import pytest

from mlx_flashhead.index.files import CONFIG_KEY, FILE_NAME
from model_folders import VOCAB_SIZE, write_model

N_CLUSTERS = -(-VOCAB_SIZE // 16)


def copy_with_entry(folder, target, **changes):
    """A checkpoint whose config.json has other settings of the FlashHead."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config[CONFIG_KEY] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(params=["generate", "evaluate"])
def refused_model(request, refused, text):
    """A function that names a model to a command which must refuse it."""
    rest = {"generate": ("--prompt", "x"), "evaluate": ("text", "--text", text)}[request.param]
    return lambda model: refused(request.param, *rest, "--model", model)


@pytest.mark.parametrize("name", ["./absent", "/absent", "absent/model", "one/two/three"])
def test_no_such_model(refused_model, refused, name, tmp_path):
    assert "no folder" in refused_model(name)
    assert "no folder" in refused("convert", "--model", name, "--mlx-path", tmp_path / "x", "-q")
    assert not (tmp_path / "x").exists()


def test_model_without_flash_head(refused, dense, text):
    for command in (("generate",), ("evaluate", "text", "--text", text)):
        said = refused(*command, "--model", dense, "--no-build")
        assert "There is no FlashHead of model yet" in said and "--no-build" in said


@pytest.mark.parametrize("kept", [0, 5, 0.1, 0.999])
def test_flash_head_truncated(refused_model, converted, tmp_path, kept):
    shutil.copytree(converted, tmp_path / "model")
    file = tmp_path / "model" / FILE_NAME
    content = file.read_bytes()
    file.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    assert "damaged or incomplete" in refused_model(tmp_path / "model")


def test_flash_head_of_another_version(refused_model, converted, tmp_path):
    model = copy_with_entry(converted, tmp_path / "model", version=2)
    assert "version 2" in refused_model(model)


@pytest.mark.parametrize("n_probes", [0, N_CLUSTERS + 1])
def test_stored_probes_out_of_range(refused_model, converted, tmp_path, n_probes):
    model = copy_with_entry(converted, tmp_path / "model", n_probes=n_probes)
    assert "make it again with mlx_flashhead.convert" in refused_model(model)


def test_flash_head_of_other_rows(refused_model, converted, tmp_path):
    other = write_model(tmp_path / "other", tied=False, hidden_size=128, seed=9)
    shutil.copytree(converted, tmp_path / "model")
    shutil.copy(other / "model.safetensors", tmp_path / "model")
    said = refused_model(tmp_path / "model")
    assert "belongs to other rows" in said and "one is found" in said


def test_config_that_is_none(refused_model, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "model" / "config.json").write_bytes(content)
        assert "config.json" in refused_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    assert "config.json" in refused_model(tmp_path / "model")


def test_weights_truncated(refused_model, refused, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "mlx-lm cannot load" in refused_model(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--mlx-path", tmp_path / "x")
    assert "mlx-lm cannot load" in refused("convert", *arguments)
