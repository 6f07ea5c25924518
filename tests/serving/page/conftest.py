"""A headless Chromium with the screens of Apple's tablets, phones and laptops."""

import os
import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright

from mlx_flashhead.serving.access import Access
from scripted_server import LAN_NAME, TOKEN

# The first one, which has no windows, is the quickest.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSERS += ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
ARGUMENTS = (
    # Chromium's own sandbox does not work as root, as in a container.
    "--no-sandbox",
    "--disable-gpu",
    f"--host-resolver-rules=MAP {LAN_NAME} 127.0.0.1",
)
# Their widths and heights are points.
SCREENS = {
    "macbook": (1440, 900),
    "ipad": (820, 1180),
    "ipad-landscape": (1180, 820),
    "ipad-half": (507, 1180),
    "small": (800, 600),
    "iphone": (390, 844),
    "iphone-se": (320, 568),
}
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def chromium():
    """The browser, or a visible skip. While it is open, its event loop runs in this thread."""
    installed = [path for path in map(shutil.which, BROWSERS) if path is not None]
    named = os.environ.get("MLX_FLASHHEAD_TEST_BROWSER")
    if named:
        path = named
    elif installed:
        path = installed[0]
    else:
        pytest.skip("no Chromium: install Debian's chromium-headless-shell, or Chrome on a Mac")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opener(chromium, port, headers=None):
    """What opens pages, with touch but on the MacBook: no script fails, no other host is used."""
    contexts = []
    problems = []
    hosts = set()

    def log(message):
        # A rejected or broken request is logged by the browser itself, and is what some tests do.
        if message.type == "error" and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def open_page(screen="iphone", url="/", *, dark=False, worker=False, locale=None):
        width, height = SCREENS[screen]
        service_workers = "allow" if worker else "block"
        color_scheme = "dark" if dark else "light"
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            service_workers=service_workers,
            has_touch=screen != "macbook",
            is_mobile=screen != "macbook",
            color_scheme=color_scheme,
            # No frames are drawn for what moves.
            reduced_motion="reduce",
            locale=locale,
            base_url=f"http://127.0.0.1:{port}",
            extra_http_headers=headers,
        )
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", log)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    assert len(hosts) <= 1


@pytest.fixture
def open_page(chromium, server):
    """Opens a page of the scripted server: (screen, url, dark, worker)."""
    port, script = server
    with opener(chromium, port, {"X-Test": script.test}) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def pages(chromium, scripted):
    """As `open_page`, for pages that the tests of a file share."""
    scripted[1].reset()
    with opener(chromium, scripted[0]) as pages:
        yield pages


@pytest.fixture
def page(open_page):
    """A phone's page of a server on this machine."""
    return open_page()


@pytest.fixture
def lan(server):
    """The server's address, if it is on a network: it needs the token."""
    server[1].access = Access(TOKEN)
    return f"http://{LAN_NAME}:{server[0]}/"
