"""Loading any model with a FlashHead, and what is said where that cannot be done."""

import json
import os
import shutil
from contextlib import suppress

import mlx.core as mx
import mlx_lm
import pytest

from mlx_flashhead.index.files import write_index
from mlx_flashhead.loading.head_options import REFUSE, HeadOptions
from mlx_flashhead.loading.load import load, load_with_head
from mlx_flashhead.models.install import get_flash_head
from mlx_flashhead.models.loading import load_dense
from model_folders import write_model
from refusals import refused
from tiny_models import tiny_index

TOKENS = mx.array([[3, 1, 200, 7]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with FlashHead, by form: 258 tokens in 33 clusters, 4 probes."""
    place = tmp_path_factory.mktemp("load")
    folders = {form: write_model(place / form, tied=form == "tied") for form in ("tied", "untied")}
    folders["4-bit"] = place / "4-bit"
    mlx_lm.convert(str(folders["untied"]), str(folders["4-bit"]), quantize=True)
    for folder in folders.values():
        write_index(folder, tiny_index(load_dense(folder)[0], eos_token_ids=(1,)))
    return folders


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folders["tied"], tmp_path / "model")


@pytest.mark.parametrize("form", ["tied", "untied", "4-bit"])
def test_loads_a_model_with_flash_head(folders, form):
    model, tokenizer = load(str(folders[form]))
    head = get_flash_head(model)
    assert (head.n_clusters, head.cluster_size, head.n_probes) == (33, 8, 4)
    assert (*head.eos_token_ids, tokenizer.eos_token_id) == (1, 1)
    dense, _ = mlx_lm.load(str(folders[form]))
    assert mx.allclose(model(TOKENS), dense(TOKENS), rtol=0, atol=1e-4)
    with head.settings():
        assert not mx.allclose(model(TOKENS), dense(TOKENS))
    text = mlx_lm.generate(model, tokenizer, "hello", max_tokens=12)
    assert text == mlx_lm.generate(dense, tokenizer, "hello", max_tokens=12) != ""


def test_arguments_are_passed_on(folders):
    options = {"lazy": True, "return_config": True, "n_probes": 33, "backend": "mlx"}
    options["tokenizer_config"] = {"eos_token": "A"}
    model, tokenizer, config = load(str(folders["untied"]), **options)
    head = get_flash_head(model)
    assert (config["model_type"], tokenizer.eos_token) == ("llama", "A")
    assert (head.n_probes, head.backend) == (33, "mlx")


def remove_a_tensor(folder):
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    weights.pop("model.norm.weight")
    mx.eval(weights)
    mx.save_safetensors(path, weights, metadata={"format": "mlx"})


def change_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))


@pytest.mark.parametrize(
    "spoil",
    [
        remove_a_tensor,
        change_model_type,
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
    ],
)
def test_model_that_mlx_lm_cannot_load(folder, spoil):
    spoil(folder)
    said = rf"mlx-lm cannot load the model in {folder} \(.*[\w']\)"
    refused(lambda: load(str(folder)), said, "check or fetch it again")


@pytest.mark.parametrize("content", [None, "{", '{"num_layers": 1}'])
def test_adapters_that_are_none(folder, tmp_path, content):
    adapters = tmp_path / "adapters"
    if content is not None:
        adapters.mkdir()
        (adapters / "adapter_config.json").write_text(content)
    said = f"adapters in {adapters} cannot be put on this model"
    load_it = {"adapter_path": str(adapters)}
    refused(lambda: load(str(folder), **load_it), said, "check `adapter_path`")


HOSTILE = [b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"model_type": "../../x"}'] + [
    json.dumps({key: value}).encode()
    for key, value in (
        *((key, 1e300) for key in ("hidden_size", "num_hidden_layers", "vocab_size")),
        *(("num_attention_heads", value) for value in (0, -1, [], "x")),
        *(("eos_token_id", value) for value in ("x", {}, 1e300)),
        *(("rope_scaling", value) for value in (0, [1], "x")),
        ("quantization", {"bits": 1e9}),
        ("flash_head", {"version": [1]}),
    )
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:30]))
def test_hostile_settings_of_a_model(tmp_path, dense, text):
    folder = shutil.copytree(dense, tmp_path / "model")
    good = json.loads((folder / "config.json").read_bytes())
    changes = None
    with suppress(ValueError, RecursionError):
        changes = json.loads(text)
    if isinstance(changes, dict) and "model_type" not in changes:
        text = json.dumps(good | changes).encode()
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        load_with_head(folder, HeadOptions(missing=REFUSE, progress=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, what",
    [
        ("model.Q4.gguf", "a GGUF file"),
        ("pytorch_model.bin", "PyTorch's weights"),
        ("model.pt", "PyTorch's weights"),
    ],
)
def test_other_formats_are_named(tmp_path, name, what):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {what} .{name}., which mlx-lm does not read"):
        load(str(tmp_path))
