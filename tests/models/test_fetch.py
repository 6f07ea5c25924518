"""Finding a model's folder, and installing a stored FlashHead on a model."""

from unittest.mock import Mock

import huggingface_hub
import pytest

from mlx_flashhead.index.files import FILE_NAME, write_companion
from mlx_flashhead.models import fetch
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.fetch import resolve
from model_folders import write_model
from refusals import refused
from tiny_models import tiny_index, tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model's folder."""
    return write_model(tmp_path_factory.mktemp("load") / "model")


def test_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "download", pytest.fail)  # the Hub is not asked
    refused(lambda: resolve(str(tmp_path / "nowhere")), "There is no folder .*nowhere", "check")
    refused(lambda: resolve("./nowhere"), "There is no folder", "check")
    refused(lambda: resolve("~/nowhere/at/all"), "There is no folder", "check")
    refused(lambda: resolve("one/two/three"), "There is no folder one/two/three", "check")


def test_file_in_place_of_a_folder(original):
    path = original / "model.safetensors"
    refused(lambda: resolve(str(path)), f"{path} is a file", "name its folder")


def test_what_the_hub_says_is_one_short_sentence(hub, monkeypatch):
    hub.put("owner/name", {"config.json": b"{}"})
    assert (resolve("owner/name") / "config.json").read_text() == "{}"
    refused(lambda: resolve("owner/name", "v9"), "owner/name has no revision 'v9'")
    refused(lambda: resolve("owner/other"), "no such repository on the Hugging Face Hub: check")
    refused(lambda: resolve("owner other"), "it cannot be a repository: give a folder or OWNER/")
    refused(lambda: resolve(""), "The name of the model is empty")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "download", Mock(side_effect=OSError("no\nanswer.\n")))
        said = r"no folder 'owner/name' here.*\(no answer\): check the name and the network"
        refused(lambda: resolve("owner/name"), said)
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()
    refused(lambda: resolve("owner/other"), "the Hugging Face Hub cannot be reached: check the net")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: resolve("owner/other"), "not downloaded before: .* unset HF_HUB_OFFLINE")
    assert resolve("owner/name").is_dir()


def test_a_flash_head_alone_is_no_model(tmp_path):
    write_companion(tmp_path, tiny_index(tiny_model()))
    refused(lambda: load_dense(tmp_path), "is a FlashHead without its model: give it as `flash")


def test_repository_is_downloaded_with_its_flash_head(original, monkeypatch):
    asked = {}

    def download(repository, **kwargs):
        asked.update(repository=repository, **kwargs)
        return original

    monkeypatch.setattr(fetch, "download", download)
    assert resolve("owner/name", revision="v1") == original
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert FILE_NAME in asked["allow_patterns"]
    assert "*.json" in asked["allow_patterns"]


def test_home_is_expanded(original, monkeypatch):
    monkeypatch.setenv("HOME", str(original.parent))
    assert resolve("~/model") == original
