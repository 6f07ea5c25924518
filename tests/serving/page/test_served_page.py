"""The real server with the page, as a user starts it, and the libraries that come with the page."""

import json
import re

import pytest
from playwright.sync_api import expect

from mlx_flashhead.serving.page_files import FOLDER
from page_actions import ask, settings, tap
from vendor_page import checksum


@pytest.fixture(scope="session")
def printed(http_server):
    """What the command printed: a code, and below it the address with the token."""
    printed = ""
    while "?token=" not in printed:
        printed += http_server.process.stdout.readline()
    return printed


def test_page_talks_to_the_models_and_compares_with_dense(printed, open_page):
    assert printed.count("▄") > 50 and "http://0.0.0.0" not in printed
    address = re.search(r"http://\S+\?token=[a-z0-9-]{24}", printed)[0]
    page = open_page("ipad", address)
    expect(page.locator("#model")).to_have_text("mine")
    ask(page, "Hello")
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    with settings(page):
        page.locator("#dense").tap()
    tap(page, "Answer again")
    expect(page.locator(".stats")).to_contain_text("dense")
    page.locator("#new-chat").tap()
    page.get_by_label("Model", exact=True).select_option("chain")
    with settings(page):
        page.locator("#system").fill("Be brief.")
    ask(page, "Hello")
    expect(page.locator(".stats")).to_contain_text("chain")
    tap(page, "Compare")
    expect(page.locator("#verdict")).to_contain_text("are equal")
    expect(page.locator("#sides .notice")).to_have_count(0)


def test_libraries_are_the_files_of_the_named_versions_with_licences():
    folder = FOLDER / "vendor"
    readme = (folder / "README.md").read_text()
    for name, entry in json.loads((folder / "vendored.json").read_text()).items():
        paths = [path for path in (folder / name).rglob("*") if path.is_file()]
        files = {path.relative_to(folder / name).as_posix(): path.read_bytes() for path in paths}
        listed = {place: file["integrity"] for place, file in entry["files"].items()}
        assert {place: checksum(content) for place, content in files.items()} == listed
        assert "LICENSE" in files
        assert f"| {entry['version']} | {entry['license']} |" in readme
        if name == "katex":
            fonts = {place for place in files if place.endswith(".woff2")}
            styles = files["katex.min.css"].decode()
            assert set(re.findall(r"fonts/[\w-]+\.woff2", styles)) == fonts
