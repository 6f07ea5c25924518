"""What is known of a model that is converted, from its folder and from the Hub."""

import json

import pytest

from mlx_flashhead.models.fetch import resolve
from mlx_flashhead.publishing.card import card_metadata, find_provenance, read_metadata

CARD = """---
license: llama3.2
license_link: https://example.org/licence
language: [en, de]
library_name: transformers
pipeline_tag: image-text-to-text
tags: [chat, mlx]
base_model: maker/Base
model-index:
- name: x
  results: []
extra_gated_prompt: Accept.
---
# Title
"""


def make(folder, card=None, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | settings))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_header_of_the_new_card(tmp_path):
    folder = make(tmp_path / "models--maker--Tuned" / "snapshots" / ("a" * 40), CARD)
    base = find_provenance(str(folder), folder)
    assert (base.origin.name, base.origin.repo_id, base.origin.revision) == (
        "Tuned",
        "maker/Tuned",
        "a" * 40,
    )
    assert card_metadata(base) == {
        "license": "llama3.2",
        "license_link": "https://example.org/licence",
        "language": ["en", "de"],
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": "maker/Tuned",
        "base_model_relation": "quantized",
        "tags": ["chat", "mlx", "flashhead"],
    }


@pytest.mark.parametrize(
    "card, settings, base_model, expected",
    [
        (None, {}, None, (None, None)),
        (None, {}, "maker/Model", ("maker/Model", "quantized")),
        (None, {"_name_or_path": "maker/Model"}, None, ("maker/Model", "quantized")),
        (None, {"_name_or_path": "/home/ann/model"}, None, (None, None)),
        (None, {"_name_or_path": "./out"}, None, (None, None)),
        (None, {"_name_or_path": "a/\x1b[2J"}, None, (None, None)),
        ("---\nlibrary_name: mlx\nbase_model: 5\n---\n", {}, None, (None, None)),
        ("---\nlibrary_name: mlx\nbase_model: maker/M\n---\n", {}, None, ("maker/M", "quantized")),
        # a copy of a fine-tune's folder does not say its own name, only what it was made from
        (CARD, {}, None, ("maker/Base", None)),
        (CARD, {}, "maker/Tuned", ("maker/Tuned", "quantized")),
    ],
)
def test_base_model_of_a_local_folder(tmp_path, card, settings, base_model, expected):
    folder = make(tmp_path / "Local-Model", card, **settings)
    base = find_provenance(str(folder), folder, base_model)
    metadata = card_metadata(base)
    assert (metadata.get("base_model"), metadata.get("base_model_relation")) == expected
    named = base.origin.repo_id or "Local-Model"
    assert base.origin.name == named.rpartition("/")[2]
    assert base.origin.revision is None


def test_card_of_a_base_model_that_is_named(hub, tmp_path):
    hub.put("maker/Tuned", {"README.md": CARD.encode(), "LICENSE.txt": b"of the Hub"})
    folder = make(tmp_path / "local")
    (folder / "NOTICE").write_text("of the folder")
    base = find_provenance(str(folder), folder, "maker/Tuned")
    assert card_metadata(base)["language"] == ["en", "de"]
    assert {file.read_text() for file in base.files} == {"of the Hub", "of the folder"}
    assert base.origin.revision is None
    assert find_provenance(str(folder), folder, "maker/absent").metadata == {}
    # the folder's own card comes first
    (folder / "README.md").write_text("---\nlanguage: fr\n---\n")
    found = card_metadata(find_provenance(str(folder), folder, "maker/Tuned"))
    assert (found["language"], found["base_model"]) == ("fr", "maker/Tuned")


def test_licence_is_named_where_the_card_is_silent(tmp_path):
    folder = make(tmp_path / "model")
    (folder / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    for given in (None, "llama3.2"):
        base = find_provenance("x", folder, license=given)
        assert base.licence.identifier == "llama3.2"
        assert card_metadata(base)["license"] == "llama3.2"


@pytest.mark.parametrize(
    "text", ["", "no header", "---\n: [\n---\n", "---\n- a list\n---\n", "---\n---\n", "\xff"]
)
def test_cards_that_say_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_metadata(tmp_path / "README.md") == {}
    assert read_metadata(tmp_path / "absent.md") == {}


def test_card_and_licence_are_fetched_beside_the_model(hub, tmp_path):
    files = {"config.json": b"{}", "README.md": CARD.encode(), "LICENSE.txt": b"text"}
    hub.put("maker/Tuned", files | {"USE_POLICY.md": b"policy", "big.bin": b"no"})
    base = find_provenance("maker/Tuned", resolve("maker/Tuned"))
    assert base.origin.repo_id == "maker/Tuned"
    assert base.origin.revision == hub.repositories["maker/Tuned"].sha(1)
    assert base.metadata["language"] == ["en", "de"]
    assert [file.name for file in base.files] == ["LICENSE.txt", "USE_POLICY.md"]
    # what was not fetched while there was a network is not missed without it
    hub.put("maker/Bare", {"config.json": b"{}", "README.md": CARD.encode()})
    folder = resolve("maker/Bare")
    hub.down = True
    assert find_provenance("maker/Bare", folder).metadata == {}
