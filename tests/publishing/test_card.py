"""What is known of a base model, the model card, and what licences with conditions ask for."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from mlx_flashhead.index.flash_head_config import FlashHeadConfig
from mlx_flashhead.models.fetch import resolve
from mlx_flashhead.models.origin import Origin
from mlx_flashhead.publishing import card as cards
from mlx_flashhead.publishing import licence as licences

LLAMA = next(licence for licence in licences.LICENCES if licence.identifier == "llama3.2")
METADATA = {
    "license": "llama3.2",
    "language": ["en"],
    "tags": ["mlx", "flashhead"],
    "library_name": "mlx",
    "pipeline_tag": "text-generation",
    "base_model": "meta-llama/Llama-3.2-1B",
    "base_model_relation": "quantized",
}
FIGURES = {"coverage": 0.9, "kl": 0.0234, "bytes_per_token": 12_345_678, "bytes_share": 0.0885}
REPORT = {
    "positions": 1800,
    "dense_perplexity": 3.21,
    "dense_bytes": 139_460_608,
    "by_probes": [
        FIGURES | {"n_probes": 128, "agreement": 0.98765, "perplexity_ratio": 1.2345},
        FIGURES | {"n_probes": 256, "agreement": 0.9951, "perplexity_ratio": None},
    ],
}
CONFIG = FlashHeadConfig(
    vocab_size=128_256,
    n_clusters=8016,
    cluster_size=16,
    n_probes=256,
    unverified_probes=128,
    fingerprint="f",
    calibration={"source": "builtin", "positions": 12_000, "seed": 7},
    report=REPORT,
    recipe={
        "command": "mlx_flashhead.convert --hf-path meta-llama/Llama-3.2-1B -q --seed 7",
        "versions": {"python": "3.11.7", "mlx": "0.32.4"},
        "platform": "Darwin arm64",
        "files": {"text.txt": "ab" * 32},
    },
)


def write(folder, config=CONFIG, metadata=METADATA, **kwargs):
    named = {"title": "Llama-3.2-1B-FlashHead-4bit", "model": "me/Llama"} | kwargs
    cards.write_card(folder, metadata, config, **named)
    return (folder / "README.md").read_text()


def test_header_and_text(tmp_path):
    card = write(tmp_path)
    assert ModelCard(card).data.to_dict() == METADATA
    for said in (
        "# Llama-3.2-1B-FlashHead-4bit\n\n**Built with Llama**\n\n",
        "[meta-llama/Llama-3.2-1B](https://huggingface.co/meta-llama/Llama-3.2-1B)",
        "**independent implementation**",
        "mlx_flashhead.generate --model me/Llama",
        'load("me/Llama")',
        "| 128 | 98.77 % | 90.00 % | 0.023 | 1.234 | 12.35 MB | 8.8 % |",
        "| **256** | 99.51 % | 90.00 % | 0.023 | – | 12.35 MB | 8.8 % |",
        "mlx_flashhead.convert --hf-path meta-llama/Llama-3.2-1B -q --seed 7",
        f"SHA-256 of text.txt: `{'ab' * 32}`",
        "[Llama 3.2 Community License](https://www.llama.com/llama3_2/license)",
        LLAMA.notice.rstrip("."),
        "arXiv:2603.14591",
    ):
        assert " ".join(said.split()) in " ".join(card.split()), said


def test_what_was_not_measured_or_is_damaged_is_not_shown(tmp_path):
    card = write(tmp_path, replace(CONFIG, report={}, calibration={"source": "none", "seed": 0}))
    assert "| probes |" not in card
    assert "Nothing, since it was not calibrated" in card
    assert "Not calibrated, seed 0." in card
    assert "tokens per second" not in card

    for wrong in ({"report": {"by_probes": [None]}}, {"recipe": {"versions": 5}}):
        with pytest.raises(ValueError, match=r"that a card cannot show \(.*make it again with"):
            write(tmp_path, replace(CONFIG, **wrong))


def test_other_licences(tmp_path):
    named = {"license": "other", "license_name": "own", "license_link": "https://e.org/l"}
    for metadata, said in (
        (METADATA | named, "The base model's: [own](https://e.org/l)."),
        (METADATA | named | {"license_link": "LICENSE"}, "The base model's: own."),
        ({}, "Its files do not name it"),
    ):
        card = write(tmp_path, metadata=metadata)
        assert said in card
        assert "Built with" not in card


TEXTS = {
    "llama3.2": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.2 Version Release Date: …",
    "llama3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n",
    "gemma": "# Gemma Terms of Use\n\nLast modified: …",
}


def test_recognise():
    for expected, metadata in (
        ("llama3.1", {"license": ["llama3.1"]}),
        ("gemma", {"license": "gemma"}),
        ("llama3.3", {"license": "other", "license_name": "llama-3.3-community-license"}),
        ("llama3", {"license": "other", "license_name": "meta-llama-3-community"}),
        (None, {"license": "other", "license_name": "qwen"}),
        # Nothing is guessed.
        (None, {"base_model": "meta-llama/Llama-3.2-1B"}),
    ):
        found = licences.recognise(metadata, [])
        if expected is None:
            assert found is None, metadata
        else:
            assert found.identifier == expected, metadata


def checked(folder, identifier, repo_id=None):
    files = licences.licence_files(folder)
    licences.check_licence({"license": identifier}, files, repo_id, model="m", where=str(folder))


def test_a_name_begins_as_the_licence_asks(tmp_path):
    for licence, name in (
        ("llama3.2", "llama-tuned"),
        ("llama3", "llama3-8B"),
        ("gemma", "anything"),
    ):
        (tmp_path / "LICENSE.txt").write_text(TEXTS[licence])
        checked(tmp_path, licence, f"me/{name}")
    for licence, name, suggested in (
        ("llama3.2", "tuned-Llama", "Llama-tuned-Llama"),
        ("llama3", "Llama-8B", "Llama-3-Llama-8B"),
    ):
        (tmp_path / "LICENSE.txt").write_text(TEXTS[licence])
        with pytest.raises(ValueError, match=rf"^me/{name} is not .* call it me/{suggested}, "):
            checked(tmp_path, licence, f"me/{name}")
        checked(tmp_path, licence, f"me/{suggested}")


def test_a_copy_of_the_text_is_needed(tmp_path):
    missing = rf"missing: save https://www.llama.com/llama3_2/license as .* in {tmp_path}"
    # The notice names the licence, but is no copy of it; nor is another licence's text.
    licences.write_notice(LLAMA, tmp_path)
    for other in ("", TEXTS["llama3"]):
        (tmp_path / "LICENSE.txt").write_text(other)
        with pytest.raises(ValueError, match=missing):
            checked(tmp_path, "llama3.2")
    (tmp_path / "LICENSE.txt").write_text(TEXTS["llama3.2"])
    checked(tmp_path, "llama3.2")
    checked(tmp_path, "mit")


def test_notice(tmp_path):
    (tmp_path / "NOTICE.txt").write_text("The base model's own.")
    licences.write_notice(LLAMA, tmp_path)
    text = (tmp_path / "NOTICE.txt").read_text()
    assert text == f"The base model's own.\n\n{LLAMA.notice}\n\n{licences.MODIFIED}\n"
    # One that is there is not written again.
    (tmp_path / "NOTICE.txt").rename(tmp_path / "Notice")
    licences.write_notice(LLAMA, tmp_path)
    licences.write_notice(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["Notice"]


CARD = """---
license: llama3.2
license_link: https://example.org/licence
language: [en, de]
library_name: transformers
pipeline_tag: image-text-to-text
tags: [chat, mlx]
base_model: maker/Base
extra_gated_prompt: Accept.
---
# Title
"""


def make(folder, card=None, name=None):
    folder.mkdir(parents=True)
    config = {} if name is None else {"_name_or_path": name}
    (folder / "config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_base_model_of_a_local_folder(tmp_path):
    named = ("maker/Model", "quantized")
    header = "---\nlibrary_name: mlx\nbase_model: {}\n---\n".format
    cases = (
        (None, None, None, (None, None)),
        (None, None, "maker/Model", named),
        (None, "maker/Model", None, named),
        (None, "a/\x1b[2J", None, (None, None)),
        (header(5), None, None, (None, None)),
        (header("maker/Model"), None, None, named),
        # A copy of a fine-tune's folder does not say its own name, only what it was made from.
        (CARD, None, None, ("maker/Base", None)),
        (CARD, None, "maker/Model", named),
    )
    for number, (card, name, base_model, expected) in enumerate(cases):
        folder = make(tmp_path / str(number), card, name)
        base = cards.find_provenance(str(folder), folder, base_model)
        metadata = cards.card_metadata(base)
        assert (metadata.get("base_model"), metadata.get("base_model_relation")) == expected
        if expected == named:
            assert base.origin == Origin("Model", "maker/Model")
        else:
            assert base.origin == Origin(str(number))


def test_card_of_a_base_model_that_is_named(hub, tmp_path):
    hub.put("maker/Tuned", {"README.md": CARD.encode(), "LICENSE.txt": b"of the Hub"})
    folder = make(tmp_path / "local")
    (folder / "NOTICE").write_text("of the folder")
    base = cards.find_provenance(str(folder), folder, "maker/Tuned")
    assert cards.card_metadata(base)["language"] == ["en", "de"]
    assert base.origin.revision is None
    assert {file.read_text() for file in base.files} == {"of the Hub", "of the folder"}
    assert cards.find_provenance(str(folder), folder, "maker/absent").metadata == {}
    # The folder's own card comes first.
    (folder / "README.md").write_text("---\nlanguage: fr\n---\n")
    found = cards.card_metadata(cards.find_provenance(str(folder), folder, "maker/Tuned"))
    assert (found["language"], found["base_model"]) == ("fr", "maker/Tuned")


def test_licence_is_named_where_the_card_says_nothing(tmp_path):
    folder = make(tmp_path / "model")
    (folder / "LICENSE.txt").write_text(TEXTS["llama3.2"])
    for text in (b"", b"no header", b"---\n: [\n---\n", b"---\n- a list\n---\n", b"\xff"):
        (folder / "README.md").write_bytes(text)
        assert cards.read_metadata(folder / "README.md") == {}
        base = cards.find_provenance("x", folder)
        assert base.licence.identifier == cards.card_metadata(base)["license"] == "llama3.2"


def test_card_and_licence_are_fetched_beside_the_model(hub, tmp_path):
    files = {"config.json": b"{}", "README.md": CARD.encode(), "LICENSE.txt": b"text"}
    hub.put("maker/Tuned", files | {"USE_POLICY.md": b"policy", "big.bin": b"no"})
    base = cards.find_provenance("maker/Tuned", resolve("maker/Tuned"))
    assert base.origin == Origin("Tuned", "maker/Tuned", hub.repositories["maker/Tuned"].sha(1))
    assert [file.name for file in base.files] == ["LICENSE.txt", "USE_POLICY.md"]
    assert cards.card_metadata(base) == METADATA | {
        "license_link": "https://example.org/licence",
        "language": ["en", "de"],
        "base_model": "maker/Tuned",
        "tags": ["chat", "mlx", "flashhead"],
    }
    # What was not fetched while there was a network is not missed without it.
    hub.put("maker/Bare", {"config.json": b"{}", "README.md": CARD.encode()})
    folder = resolve("maker/Bare")
    hub.down = True
    assert cards.find_provenance("maker/Bare", folder).metadata == {}
