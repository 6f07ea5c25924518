"""The libraries that come with the page: exactly the files of the named versions, with licences."""

import base64
import hashlib
import json
import re

from mlx_flashhead.serving.network.page_files import FOLDER

VENDOR = FOLDER / "vendor"
LISTED = json.loads((VENDOR / "vendored.json").read_text())


def checksum(path):
    """SHA-512 of a file, as npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"


def test_files_are_those_of_the_list():
    for name, entry in LISTED.items():
        folder = VENDOR / name
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): checksum(path) for path in paths}
        assert files == {place: file["integrity"] for place, file in entry["files"].items()}
        assert "LICENSE" in files
        readme = (VENDOR / "README.md").read_text()
        assert f"| {entry['version']} | {entry['license']} |" in readme


def test_every_font_of_the_styles_is_here():
    styles = (VENDOR / "katex" / "katex.min.css").read_text()
    fonts = set(re.findall(r"fonts/[A-Za-z0-9_-]+\.woff2", styles))
    assert fonts == {place for place in LISTED["katex"]["files"] if place.endswith(".woff2")}
