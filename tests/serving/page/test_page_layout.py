"""What fingers, small screens and on-screen keyboards need."""

import pytest
from playwright.sync_api import expect

from scripted_server import MODEL, scripted_server

SCREENS = ("ipad", "ipad-landscape", "iphone", "iphone-se")
WIDE = (
    "A_very_long_word_" * 30
    + "\n\n```\n"
    + "code " * 100
    + "\n```\n\n|a|b|\n|-|-|\n|"
    + "x" * 300
    + "|y|"
)


@pytest.fixture(scope="module")
def url():
    """The address of a server whose every answer is wide."""
    with scripted_server() as (port, script):
        script.answers = [[WIDE] for _ in range(30)]
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def show(url, open_page):
    """Opens the page with an answer: screen → page."""

    def show(screen):
        page = open_page(url, screen)
        expect(page.locator("#model")).to_have_text(MODEL["name"])
        page.locator("#input").fill("Wide")
        page.locator("#send").tap()
        expect(page.locator(".stats")).to_be_visible()
        return page

    return show


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_is_too_small_or_sticks_out(show, screen):
    page = show(screen)
    nameless = "button:has(svg):not([title]), .round:not([aria-label])"
    assert page.locator(nameless).count() == 0
    page.get_by_role("button", name="Edit the question").tap()
    for opened in (None, ".actions .text", "#open-settings"):
        if opened:
            page.locator(opened).tap()
        sizes = page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, select, summary")]
                .filter((e) => e.checkVisibility({ visibilityProperty: true }))
                .map((e) => [e.id || e.className, e.getBoundingClientRect().toJSON()])"""
        )
        assert len(sizes) > 5
        for name, box in sizes:
            smallest = (
                32 if name in ("temperature", "top_p", "n_probes", "max_tokens", "dense") else 43
            )
            assert min(box["width"], box["height"]) >= smallest, name
            assert box["left"] >= 0 and box["right"] <= page.viewport_size["width"], name
        page.evaluate("document.querySelector('dialog[open]')?.close()")
    assert page.evaluate("scroller.scrollWidth <= scroller.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_inputs_do_not_make_ios_zoom_in(show):
    page = show("iphone")
    sizes = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select")]
            .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
    )
    assert len(sizes) > 5 and min(sizes) >= 16


@pytest.mark.parametrize("screen", SCREENS)
def test_keyboard_does_not_hide_the_input(show, screen):
    """Safari leaves the page as it is and makes only the visual viewport smaller, and moves it."""
    page = show(screen)
    height = page.viewport_size["height"]
    visible = page.evaluate(
        """async (height) => {
            const { follow } = await import("/page/viewport.js");
            const viewport = Object.assign(new EventTarget(), { height, offsetTop: 0, scale: 1 });
            follow(viewport);
            Object.assign(viewport, { height: height * 0.55, offsetTop: 30 });
            viewport.dispatchEvent(new Event("resize"));
            for (let i = 0; i < 3; i += 1) await new Promise(requestAnimationFrame);
            const box = document.getElementById("composer").getBoundingClientRect();
            return [box.top, box.bottom, document.documentElement.className];
        }""",
        height,
    )
    assert visible[0] > 30 + height * 0.2
    assert 30 + height * 0.55 - 20 < visible[1] <= 30 + height * 0.55
    assert visible[2] == "keyboard"
    assert page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") < 2


def test_magnifying_is_not_taken_for_a_keyboard(show):
    page = show("ipad")
    height = page.evaluate(
        """async () => {
            const { follow } = await import("/page/viewport.js");
            const full = { height: 1180, offsetTop: 0, scale: 1 };
            const viewport = Object.assign(new EventTarget(), full);
            follow(viewport);
            Object.assign(viewport, { height: 590, scale: 2 });
            viewport.dispatchEvent(new Event("resize"));
            return document.getElementById("app").getBoundingClientRect().height;
        }"""
    )
    assert height == 1180


def test_reader_is_not_pulled_down(show):
    page = show("iphone")
    page.locator("#input").fill("Again")
    page.locator("#send").tap()
    expect(page.locator(".stats")).to_have_count(2)
    page.evaluate("scroller.scrollTop = 0")
    expect(page.locator("#to-end")).to_be_visible()
    page.locator("#to-end").tap()
    expect(page.locator("#to-end")).to_be_hidden()
    assert page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") < 2


def test_safe_areas_are_asked_for(show):
    page = show("iphone")
    viewport = page.locator("meta[name=viewport]").get_attribute("content")
    assert "viewport-fit=cover" in viewport and "user-scalable" not in viewport
    sides = page.evaluate(
        """[...document.styleSheets].flatMap((sheet) => [...sheet.cssRules])
            .map((rule) => rule.cssText).join().match(/safe-area-inset-\\w+/g)"""
    )
    assert set(sides) == {f"safe-area-inset-{side}" for side in ("top", "right", "bottom", "left")}
