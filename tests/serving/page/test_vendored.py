"""The libraries that come with the page: exactly the files of the named versions, with licences."""

import base64
import hashlib
import json
import re

import pytest

from mlx_flashhead.serving.network.page_files import FOLDER

VENDOR = FOLDER / "vendor"
LISTED = json.loads((VENDOR / "vendored.json").read_text())


def checksum(path):
    """SHA-512 of a file, as npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"


@pytest.mark.parametrize("name", LISTED)
def test_files_are_those_of_the_list(name):
    folder = VENDOR / name
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    listed = LISTED[name]["files"]
    assert files == set(listed) and "LICENSE" in files
    assert {place: checksum(folder / place) for place in files} == {
        place: file["integrity"] for place, file in listed.items()
    }
    assert re.fullmatch("sha512-[A-Za-z0-9+/]{86}==", LISTED[name]["integrity"])


@pytest.mark.parametrize(
    "name, file", [("marked", ""), ("dompurify", "purify.es.mjs"), ("katex", "katex.min.js")]
)
def test_versions_and_licences_are_named(name, file):
    entry = LISTED[name]
    readme = (VENDOR / "README.md").read_text()
    assert f"| {entry['version']} | {entry['license']} |" in readme
    # the files themselves say their version, but for marked's
    assert not file or entry["version"] in (VENDOR / name / file).read_text()


def test_every_font_of_the_styles_is_here():
    styles = (VENDOR / "katex" / "katex.min.css").read_text()
    fonts = set(re.findall(r"fonts/[A-Za-z0-9_-]+\.woff2", styles))
    assert fonts == {place for place in LISTED["katex"]["files"] if place.endswith(".woff2")}
