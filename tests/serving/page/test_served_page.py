"""The real server with the page: the command as a user starts it, in a browser."""

import re

import pytest
from playwright.sync_api import expect

from page_actions import ask, settings, tap


@pytest.fixture(scope="session")
def page_url(http_server):
    """The address that the command printed, with the token, below a code."""
    lines = []
    for line in http_server.process.stdout:
        lines.append(line)
        if "?token=" in line:
            break
    printed = "".join(lines)
    assert printed.count("▄") > 50 and "http://0.0.0.0" not in printed
    return re.search(r"http://\S+\?token=[a-z0-9-]{24}", printed)[0]


def test_page_talks_to_the_models_and_compares_with_dense(page_url, open_page):
    page = open_page("ipad", page_url)
    expect(page.locator("#model")).to_have_text("mine")
    ask(page, "Hello")
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    with settings(page):
        page.locator("#dense").tap()
    tap(page, "Answer again")
    expect(page.locator(".stats")).to_contain_text("dense")
    expect(page.locator(".notice[role=alert]")).to_have_count(0)

    page.locator("#new-chat").tap()
    page.get_by_label("Model", exact=True).select_option("chain")
    with settings(page):
        page.locator("#system").fill("Be brief.")
    ask(page, "Hello")
    expect(page.locator(".stats")).to_contain_text("chain")
    tap(page, "Compare")
    expect(page.locator("#verdict")).to_contain_text("are equal")
    expect(page.locator("#sides .notice")).to_have_count(0)
