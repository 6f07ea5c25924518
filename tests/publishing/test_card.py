"""The model card, and what licences with conditions ask for."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from mlx_flashhead.index.settings import FlashHeadConfig
from mlx_flashhead.publishing.card import text_below_marker, write_card
from mlx_flashhead.publishing.licences import (
    LICENCES,
    MODIFIED,
    check,
    licence_files,
    recognise,
    write_notice,
)

LLAMA = next(licence for licence in LICENCES if licence.identifier == "llama3.2")
METADATA = {
    "license": "llama3.2",
    "language": ["en"],
    "library_name": "mlx",
    "pipeline_tag": "text-generation",
    "base_model": "meta-llama/Llama-3.2-1B",
    "base_model_relation": "quantized",
    "tags": ["mlx", "flashhead"],
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


def write(folder, config=CONFIG, metadata=METADATA, licence=LLAMA, **kwargs):
    named = {"title": "Llama-3.2-1B-FlashHead-4bit", "model": "me/Llama"} | kwargs
    write_card(folder, metadata, config, licence, **named)
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
        "mlx_lm.generate --model me/Llama",
        "On 1,800 positions",
        "| 128 | 98.77 % | 90.00 % | 0.023 | 1.234 | 12.35 MB | 8.8 % |",
        "| **256** | 99.51 % | 90.00 % | 0.023 | – | 12.35 MB | 8.8 % |",
        "the dense head's 3.21",
        "dense head reads 139.46 MB",
        "mlx_flashhead.convert --hf-path meta-llama/Llama-3.2-1B -q --seed 7",
        "python 3.11.7, mlx 0.32.4 on Darwin arm64",
        "12,000 positions of built-in text of many kinds, seed 7",
        f"SHA-256 of text.txt: `{'ab' * 32}`",
        "[Llama 3.2 Community License](https://www.llama.com/llama3_2/license)",
        LLAMA.notice.rstrip("."),
        "arXiv:2603.14591",
    ):
        assert " ".join(said.split()) in " ".join(card.split()), said


def test_what_was_not_measured_is_not_shown(tmp_path):
    config = dataclasses.replace(
        CONFIG, report={}, calibration={"source": "none", "positions": 0, "seed": 0}
    )
    card = write(tmp_path, config)
    assert "| probes |" not in card and "Nothing, since it was not calibrated" in card
    assert "Not calibrated, seed 0." in card
    assert "tokens per second" not in card and "M2" not in card  # estimates are no measurements


@pytest.mark.parametrize(
    "wrong", [{"report": {"by_probes": [None]}}, {"recipe": {"versions": 5}}, {"calibration": {}}]
)
def test_settings_that_a_card_cannot_show(tmp_path, wrong):
    config = dataclasses.replace(CONFIG, **wrong)
    if "calibration" in wrong:
        assert "Not calibrated" in write(tmp_path, config)
        return
    with pytest.raises(ValueError, match=r"that a card cannot show \(.*make it again with"):
        write(tmp_path, config)


def test_other_licences(tmp_path):
    for link, shown in (("https://e.org/l", "[own](https://e.org/l)"), ("LICENSE", "own")):
        named = {"license": "other", "license_name": "own", "license_link": link}
        card = write(tmp_path, metadata=METADATA | named, licence=None)
        assert f"The base model's: {shown}." in card
    card = write(tmp_path, metadata={}, licence=None)
    assert "Its files do not name it" in card and "Built with" not in card


@pytest.mark.parametrize("text", ["", "My text.\n", "# A\n\n---\n<!-- x -->\n", "no newline"])
def test_own_text_is_kept_and_a_card_without_the_marker_is_all_own_text(tmp_path, text):
    assert text_below_marker(write(tmp_path, own_text=text)) == text
    assert text_below_marker("---\nlicense: mit\n---\n\n# Mine\n") == "# Mine\n"
    assert text_below_marker("") == ""


BY_NAME = {licence.identifier: licence for licence in LICENCES}
TEXTS = {
    "llama3.2": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.2 Version Release Date: …",
    "llama3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n",
    "gemma": "# Gemma Terms of Use\n\nLast modified: …",
}


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"license": "llama3.2"}, "llama3.2"),
        ({"license": "llama3"}, "llama3"),
        ({"license": ["llama3.1"]}, "llama3.1"),
        ({"license": "gemma"}, "gemma"),
        ({"license": "other", "license_name": "llama-3.3-community-license"}, "llama3.3"),
        ({"license": "other", "license_name": "meta-llama-3-community"}, "llama3"),
        ({"license": "apache-2.0"}, None),
        ({"license": "other", "license_name": "qwen"}, None),
        ({"base_model": "meta-llama/Llama-3.2-1B"}, None),  # nothing is guessed
    ],
)
def test_recognise(metadata, expected):
    found = recognise(metadata, [])
    assert (found and found.identifier) == expected


@pytest.mark.parametrize("name", TEXTS)
def test_recognise_by_its_text(tmp_path, name):
    (tmp_path / "LICENSE.txt").write_text(TEXTS[name])
    assert recognise({}, licence_files(tmp_path)) == BY_NAME[name]
    declared = {"license": "apache-2.0"}
    assert recognise(declared, licence_files(tmp_path)) is None


def checked(folder, identifier, repo_id=None):
    files = licence_files(folder)
    check({"license": identifier}, files, repo_id, model="m", place=str(folder))


@pytest.mark.parametrize(
    "licence, name, suggested",
    [
        ("llama3.2", "Llama-3.2-1B-FlashHead-4bit", None),
        ("llama3.2", "llama-tuned", None),
        ("llama3.2", "tuned-Llama", "Llama-tuned-Llama"),
        ("llama3", "llama3-8B", None),
        ("llama3", "Llama-8B", "Llama-3-Llama-8B"),
        ("gemma", "anything", None),
    ],
)
def test_prefix(tmp_path, licence, name, suggested):
    (tmp_path / "LICENSE.txt").write_text(TEXTS[licence])
    if suggested is None:
        checked(tmp_path, licence, f"me/{name}")
        return
    with pytest.raises(ValueError, match=rf"^me/{name} is not .* call it me/{suggested}, "):
        checked(tmp_path, licence, f"me/{name}")
    checked(tmp_path, licence, f"me/{suggested}")


def test_a_copy_of_the_text_is_needed(tmp_path):
    address = "https://www.llama.com/llama3_2/license"
    with pytest.raises(ValueError, match=rf"missing: save {address} as LICENSE.txt in {tmp_path}"):
        checked(tmp_path, "llama3.2")
    # the notice names the licence, but is no copy of it; nor is another licence's text
    write_notice(BY_NAME["llama3.2"], tmp_path)
    for other in ("", TEXTS["llama3"]):
        (tmp_path / "LICENSE.txt").write_text(other)
        with pytest.raises(ValueError, match="its text is missing"):
            checked(tmp_path, "llama3.2")
    (tmp_path / "LICENSE.txt").write_text(TEXTS["llama3.2"])
    checked(tmp_path, "llama3.2")
    checked(tmp_path, "mit")


@pytest.mark.parametrize("licence", LICENCES, ids=lambda licence: licence.identifier)
def test_notice(tmp_path, licence):
    (tmp_path / "NOTICE.txt").write_text("The base model's own.")
    write_notice(licence, tmp_path)
    text = (tmp_path / "NOTICE.txt").read_text()
    assert text == f"The base model's own.\n\n{licence.notice}\n\n{MODIFIED}\n"
    # one that is there is not written again
    (tmp_path / "NOTICE.txt").rename(tmp_path / "Notice")
    write_notice(licence, tmp_path)
    write_notice(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["Notice"]
