"""Loading a FlashHead checkpoint, and what is said where that cannot be done."""

import importlib
import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_flashhead.index.files import FILE_NAME, write_index
from mlx_flashhead.models.install import get_flash_head
from mlx_flashhead.models.load import install_index, load, load_dense, resolve
from model_folders import VOCAB_SIZE, write_model
from tiny_models import tiny_index, tiny_model

# the package has a function of this name
module = importlib.import_module("mlx_flashhead.models.load")
TOKENS = mx.array([[3, 1, 200, 7]])


@pytest.fixture(scope="module", params=["tied", "untied", "4-bit"])
def original(request, tmp_path_factory):
    """A folder with FlashHead: 258 tokens in 33 clusters, 4 probes."""
    folder = tmp_path_factory.mktemp("load") / "model"
    write_model(folder, tied=request.param == "tied")
    if request.param == "4-bit":
        quantize(folder)
    write_index(folder, tiny_index(load_dense(folder)[0], eos_token_ids=(1,)))
    return folder


def quantize(folder):
    """Puts a quantized model of the same vocabulary in place of the folder's."""
    model = tiny_model(vocab_size=VOCAB_SIZE, num_hidden_layers=2, tied=False, bits=4)
    weights = tree_flatten(model.parameters(), destination={})
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(original, tmp_path / "model")


def test_loads_a_model_with_flash_head(original):
    model, tokenizer = load(str(original))
    head = get_flash_head(model)
    assert (head.n_clusters, head.cluster_size, head.n_probes) == (33, 8, 4)
    assert head.eos_token_ids == (1,)
    assert tokenizer.eos_token_id == 1
    dense, _ = mlx_lm.load(str(original))
    assert not mx.allclose(model(TOKENS), dense(TOKENS))
    with head.dense():
        assert mx.allclose(model(TOKENS), dense(TOKENS), rtol=0, atol=1e-4)
    # random models end late or never, so the texts are compared token by token
    with head.dense():
        text = mlx_lm.generate(model, tokenizer, "hello", max_tokens=12)
    assert text == mlx_lm.generate(dense, tokenizer, "hello", max_tokens=12)
    assert text


def test_arguments_are_passed_on(original):
    model, _, config = load(
        str(original), lazy=True, return_config=True, n_probes=33, backend="mlx"
    )
    assert config["model_type"] == "llama"
    head = get_flash_head(model)
    assert (head.n_probes, head.backend) == (33, "mlx")
    with_other_eos, tokenizer = load(str(original), tokenizer_config={"eos_token": "A"})
    assert tokenizer.eos_token == "A"
    assert get_flash_head(with_other_eos) is not None


def refused(call, *expected):
    """The call raises one sentence with each of the patterns."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for pattern in expected:
        error.match(pattern)


def test_folder_without_flash_head(tmp_path):
    folder = write_model(tmp_path / "model")
    refused(
        lambda: load(str(folder)),
        str(folder),
        "without FlashHead",
        r"convert it with `mlx_flashhead\.convert --model",
    )


def test_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "download", pytest.fail)  # the Hub is not asked
    refused(lambda: load(str(tmp_path / "nowhere")), "There is no folder .*nowhere", "check")
    refused(lambda: load("./nowhere"), "There is no folder", "check")
    refused(lambda: load("~/nowhere/at/all"), "There is no folder", "check")
    refused(lambda: load("one/two/three"), "There is no folder one/two/three", "check")


def test_file_in_place_of_a_folder(original):
    path = original / "model.safetensors"
    refused(lambda: load(str(path)), f"{path} is a file", "name the model's folder")


def test_folder_that_is_no_model(tmp_path):
    refused(lambda: load(str(tmp_path)), str(tmp_path), "not a model folder")


def test_repository_that_cannot_be_had(monkeypatch):
    def fail(repository, **_):
        raise OSError(f"We couldn't connect to the Hub\nfor {repository}.\n")

    monkeypatch.setattr(module, "download", fail)
    refused(
        lambda: load("owner/name"),
        r"no folder 'owner/name' here.*\(We couldn't connect to the Hub for owner/name\)",
        "check the name and the network",
    )


def test_repository_is_downloaded_with_its_flash_head(original, monkeypatch):
    asked = {}

    def download(repository, **kwargs):
        asked.update(repository=repository, **kwargs)
        return original

    monkeypatch.setattr(module, "download", download)
    model, _ = load("owner/name", revision="v1")
    assert get_flash_head(model) is not None
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert FILE_NAME in asked["allow_patterns"]
    assert "*.json" in asked["allow_patterns"]


def test_home_is_expanded(original, monkeypatch):
    monkeypatch.setenv("HOME", str(original.parent))
    assert resolve("~/model") == original


@pytest.mark.parametrize("n_probes", [0, -3, 34])
def test_n_probes_out_of_range(original, n_probes):
    refused(
        lambda: load(str(original), n_probes=n_probes),
        f"n_probes is {n_probes}, but this head has 33 clusters: choose 1 to 33",
    )


def test_unknown_backend(original):
    refused(lambda: load(str(original), backend="cuda"), "Unknown FlashHead backend 'cuda'")


def test_weights_changed_after_conversion(folder):
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[name] = weights[name].at[0, 0].add(1)
    mx.eval(weights)
    mx.save_safetensors(path, weights, metadata={"format": "mlx"})
    refused(
        lambda: load(str(folder)),
        f"{FILE_NAME} belongs to other rows",
        "changed after its conversion",
        r"convert it again with mlx_flashhead\.convert",
    )


def test_index_of_another_model_leaves_the_model():
    model, other = tiny_model(), tiny_model(seed=1)
    dense = model(TOKENS)
    refused(lambda: install_index(model, tiny_index(other)), "belongs to other rows")
    assert get_flash_head(model) is None
    assert mx.array_equal(model(TOKENS), dense)
    head = install_index(model, tiny_index(model), n_probes=9)
    assert get_flash_head(model) is head
    assert head.n_probes == 9


def spoil_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


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
    "spoil", [spoil_weights, remove_weights, remove_a_tensor, change_model_type]
)
def test_model_that_mlx_lm_cannot_load(folder, spoil):
    spoil(folder)
    refused(
        lambda: load(str(folder)),
        rf"mlx-lm cannot load the model in {folder} \(.*\w\)",
        "check or fetch it again",
    )
