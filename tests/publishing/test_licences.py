"""Licences with conditions: recognised, and what they ask for is there."""

import pytest

from mlx_flashhead.publishing.licences import (
    LICENCES,
    MODIFIED,
    check,
    licence_files,
    recognise,
    write_notice,
)

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
    check({"license": identifier}, files, repo_id, model="m", place=folder, before="first, ")


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
    with pytest.raises(ValueError, match=rf"first, save {address} as LICENSE.txt in {tmp_path}"):
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


def test_what_is_a_file_of_a_licence(tmp_path):
    names = {"LICENSE", "LICENCE.md", "LICENSE.txt", "USE_POLICY.md", "NOTICE", "Notice.txt"}
    for name in names | {"README.md", "config.json"}:
        (tmp_path / name).write_text("")
    (tmp_path / "LICENSES").mkdir()
    assert {path.name for path in licence_files(tmp_path)} == names
