"""What fingers, small screens and on-screen keyboards need."""

import pytest
from playwright.sync_api import expect

from page_actions import ask, tap

SMALL = ("temperature", "top_p", "n_probes", "max_tokens", "dense")
WIDE = "A_very_long_word_" * 30 + "\n\n```\n" + "code " * 100 + "\n```\n\n|a|b|\n|-|-|\n|"
WIDE += "x" * 300 + "|y|\n\nand long" + "\n\nand long" * 20
# Safari leaves the page as it is and makes only the visual viewport smaller, and moves it.
VIEWPORT = """async ([height, change]) => {
    const { follow } = await import("/page/viewport.js");
    const viewport = Object.assign(new EventTarget(), { height, offsetTop: 0, scale: 1 });
    follow(viewport);
    Object.assign(viewport, change);
    viewport.dispatchEvent(new Event("resize"));
    for (let i = 0; i < 3; i += 1) await new Promise(requestAnimationFrame);
    const [composer, app] = ["composer", "app"]
        .map((id) => document.getElementById(id).getBoundingClientRect());
    return [composer.top, composer.bottom, app.height, document.documentElement.className];
}"""


@pytest.fixture(scope="module", params=["ipad", "ipad-landscape", "iphone", "iphone-se"])
def asked(request, pages, scripted):
    """A page of each screen, with an answer."""
    scripted[1].answers = [[WIDE]]
    page = pages(request.param)
    ask(page, "Wide", ends=1)
    return page


@pytest.fixture
def page(asked):
    """The same as new."""
    asked.reload()
    expect(asked.locator(".stats")).to_have_count(1)
    return asked


def to_end(page):
    """How far the end of the text is below the screen."""
    return page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight")


def test_nothing_is_too_small_or_sticks_out(page):
    nameless = "button:has(svg):not([title]), .round:not([aria-label])"
    assert page.locator(nameless).count() == 0
    fonts = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select")]
            .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
    )
    assert len(fonts) > 5 and min(fonts) >= 16  # below that iOS zooms in
    tap(page, "Edit the question")
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
            assert min(box["width"], box["height"]) >= (32 if name in SMALL else 43), name
            assert box["left"] >= 0 and box["right"] <= page.viewport_size["width"], name
        page.evaluate("document.querySelector('dialog[open]')?.close()")
    assert page.evaluate("scroller.scrollWidth <= scroller.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keyboard_does_not_hide_the_input_and_magnifying_is_none(page):
    height = page.viewport_size["height"]
    *_, whole, name = page.evaluate(VIEWPORT, [height, {"height": height / 2, "scale": 2}])
    assert (whole, name) == (height, "")
    change = {"height": height * 0.55, "offsetTop": 30}
    top, bottom, _, name = page.evaluate(VIEWPORT, [height, change])
    assert top > 30 + height * 0.2
    assert 30 + height * 0.55 - 20 < bottom <= 30 + height * 0.55
    assert name == "keyboard"
    assert to_end(page) < 2


def test_reader_is_not_pulled_down(page):
    page.evaluate("scroller.scrollTop = 0")
    expect(page.locator("#to-end")).to_be_visible()
    page.locator("#to-end").tap()
    expect(page.locator("#to-end")).to_be_hidden()
    assert to_end(page) < 2


def test_safe_areas_are_asked_for(page):
    viewport = page.locator("meta[name=viewport]").get_attribute("content")
    assert "viewport-fit=cover" in viewport and "user-scalable" not in viewport
    sides = page.evaluate(
        """[...document.styleSheets].flatMap((sheet) => [...sheet.cssRules])
            .map((rule) => rule.cssText).join().match(/safe-area-inset-\\w+/g)"""
    )
    assert set(sides) == {f"safe-area-inset-{side}" for side in ("top", "right", "bottom", "left")}
