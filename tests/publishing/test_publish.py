"""Publishing over loopback: `huggingface_hub` itself talks to a small Hub of the tests."""

import hashlib
import logging
import shutil
import time

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import validate_repo_id

import mlx_flashhead
from loopback_hub import TOKEN, Account
from mlx_flashhead.conversion import pipeline
from mlx_flashhead.conversion.pipeline import convert
from mlx_flashhead.index.files import FILE_NAME
from mlx_flashhead.models.install import get_flash_head
from mlx_flashhead.models.origin import Origin
from mlx_flashhead.publishing.licence import recognise
from mlx_flashhead.publishing.publish import publish
from model_folders import contents, write_model

QUICK = {"calibration": "none", "progress": False}


@pytest.fixture
def converted(converted, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(converted, tmp_path / "converted")


def test_interrupted_upload_continues_with_what_is_missing(
    hub, dense, tmp_path, caplog, monkeypatch
):
    """The checkpoint is kept, and signed addresses stay out of the log."""
    # The client sleeps between its attempts.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    new = tmp_path / "new"
    hub.down_after = (dense / "model.safetensors").stat().st_size // 2
    with pytest.raises(ValueError, match=r"could not be uploaded .* is kept in") as caught:
        convert(str(dense), str(new), upload_repo="me/tiny", n_probes=4, **QUICK)
    said = str(caught.value)
    kept = contents(new)
    assert f"mlx_flashhead.upload --path {new} --repo me/tiny" in said
    assert "\n" not in said
    assert "thrown while requesting PUT" in caplog.text
    assert not any(secret in caplog.text + said for secret in ("Signature", TOKEN))
    # No half of it was committed.
    assert len(hub.repositories["me/tiny"].commits) == 1
    assert get_flash_head(mlx_flashhead.load(str(new))[0]).n_probes == 4
    hub.revive()
    # The smaller file is stored for certain.
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in kept.items()}
    hub.large[digests[FILE_NAME]] = kept[FILE_NAME]
    for sent in ({digests["model.safetensors"]: len(kept["model.safetensors"])}, {}):
        hub.sent.clear()
        publish(new, "me/tiny")
        assert hub.sent == sent
        assert hub.files("me/tiny") == contents(new)


def test_every_file_is_uploaded_and_stale_weights_are_deleted(hub, converted, monkeypatch):
    hub.put("ours/tiny", {"model-00001-of-00002.safetensors": b"old", "notes.md": b"kept"})
    # The repository is an organisation's.
    assert publish(converted, "ours/tiny") == f"{hub.url}/ours/tiny"
    assert hub.files("ours/tiny") == contents(converted) | {"notes.md": b"kept"}
    repository = hub.repositories["ours/tiny"]
    repository.refs["first"] = len(repository.commits) - 1
    hub.put("ours/tiny", {"config.json": b"{}"})
    for hub.down in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub.down)
        model, _ = mlx_flashhead.load("ours/tiny", revision="first")
        assert get_flash_head(model).n_probes == 4


def test_private(hub, converted):
    publish(converted, "me/hidden", private=True)
    publish(converted, "me/open")
    assert hub.repositories["me/hidden"].private
    assert not hub.repositories["me/open"].private
    with pytest.raises(ValueError, match="public, in spite of `private=True`"):
        publish(converted, "me/open", private=True)


def test_hidden_files_and_logs_are_not_published(hub, converted):
    (converted / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (converted / "train.log").write_text("…")
    publish(converted, "me/tiny")
    assert not {".env", "train.log"} & set(hub.files("me/tiny"))


def test_text_below_the_marker_stays(hub, converted):
    publish(converted, "me/tiny")
    card = hub.files("me/tiny")["README.md"]
    hub.put("me/tiny", {"README.md": card + b"Written on the Hub.\n"})
    publish(converted, "me/tiny")
    assert hub.files("me/tiny")["README.md"] == card + b"Written on the Hub.\n"
    (converted / "README.md").write_bytes(card + b"Written here.\n")
    publish(converted, "me/tiny")
    assert hub.files("me/tiny")["README.md"] == card + b"Written here.\n"


def test_a_model_without_a_licence_is_not_published(hub, tmp_path):
    source = write_model(tmp_path / "bare", card=None)
    target = tmp_path / "new"
    with pytest.raises(ValueError, match=r"licence of bare is not known.*`license`"):
        convert(str(source), str(target), upload=True, **QUICK)
    assert not target.exists()
    convert(str(source), str(target), **QUICK)
    with pytest.raises(ValueError, match=r"licence of .*new is not known.*`license`"):
        publish(target, "me/tiny")
    assert hub.repositories == {}
    publish(target, "me/tiny", license="mit")
    assert "\nlicense: mit\n" in hub.files("me/tiny")["README.md"].decode()
    # It stands on the card now.
    publish(target, "me/tiny")
    with pytest.raises(ValueError, match=r"`license` gemma contradicts .* says mit"):
        publish(target, "me/tiny", license="gemma")


CHANGES = {
    "none": lambda hub, patch: None,
    "no token": lambda hub, patch: patch.delenv("HF_TOKEN"),
    "unknown token": lambda hub, patch: hub.accounts.clear(),
    "read token": lambda hub, patch: hub.accounts.update({TOKEN: Account("me", role="read")}),
    "no account": lambda hub, patch: patch.setattr(HfApi, "whoami", lambda _: [1]),
    "offline": lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
    "no network": lambda hub, patch: patch.setattr(hub, "down", True),
}


@pytest.mark.parametrize(
    "change, repo, said",
    [
        ("no token", "me/tiny", r"needs a Hugging Face token, but there is none: log in"),
        ("unknown token", "me/tiny", r"does not accept the token"),
        ("read token", "me/tiny", r"me may not write to me/tiny"),
        ("no account", "me/tiny", r"cannot be reached"),
        ("none", "else/tiny", r"me may not write to else/tiny: choose .* such as me/tiny"),
        ("offline", "me/tiny", r"cannot be reached .* unset HF_HUB_OFFLINE"),
        ("no network", "me/tiny", r"cannot be reached .* check the network"),
        ("none", "a/b/c", r"'a/b/c' is not a name of a repository"),
    ],
)
def test_what_the_hub_would_refuse_is_said_before_the_conversion(
    hub, dense, converted, tmp_path, monkeypatch, change, repo, said
):
    CHANGES[change](hub, monkeypatch)
    before = contents(converted)
    for begin in (
        lambda: convert(str(dense), str(tmp_path / "new"), upload_repo=repo, **QUICK),
        lambda: publish(converted, repo),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            begin()
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert sentence.endswith(".")
        assert TOKEN not in sentence
        # Nor in what a traceback would show with it.
        assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert not (tmp_path / "new").exists()
    assert contents(converted) == before
    assert not any(method == "PUT" for method, _ in hub.requests)


def test_the_hub_is_asked_before_the_long_work_and_after_it(hub, dense, tmp_path, monkeypatch):
    """Account, licence and repository are known before a text is read; then the upload follows."""
    asked = []

    def counted(function):
        def call(*args, **kwargs):
            asked.append(len(hub.requests))
            return function(*args, **kwargs)

        return call

    for name in ("model_index", "publish"):
        monkeypatch.setattr(pipeline, name, counted(getattr(pipeline, name)))
    convert(str(dense), str(tmp_path / "new"), upload=True, **QUICK)
    before, after = asked
    assert 0 < before == after < len(hub.requests)
    assert len(hub.repositories) == 1


@pytest.mark.parametrize(
    "name, licence, expected",
    [
        ("my  model--v1..2", "mit", "my-model-v1-2-FlashHead-fp32"),
        ("ß", "mit", "model-FlashHead-fp32"),
        ("Tiny-FlashHead-fp32", "mit", "Tiny-FlashHead-fp32"),
        ("a" * 80 + "-b", "mit", "a" * 80 + "-FlashHead-fp32"),
        ("Meta-Llama-3-8B", "llama3", "Llama-3-8B-FlashHead-fp32"),
    ],
)
def test_derived_names_are_names_that_the_hub_takes(name, licence, expected):
    recognised = recognise({"license": licence}, [])
    prefix = "" if recognised is None else recognised.prefix
    found = Origin(name).result_name("fp32", prefix)
    assert found == expected
    validate_repo_id(f"me/{found}")
