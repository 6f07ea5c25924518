"""What fingers, small screens and keyboards on the screen need."""

import pytest
from playwright.sync_api import expect

from page_actions import ask, tap

SMALL = ("temperature", "top_p", "max_tokens", "dense")
WIDE = "A_very_long_word_" * 30 + "\n\n```\n" + "code " * 100 + "\n```\n\n|a|b|\n|-|-|\n|"
WIDE += "x" * 300 + "|y|\n\nand long" + "\n\nand long" * 20
# Safari leaves the page as it is and makes only the visual viewport smaller, and moves it.
VIEWPORT = """async ([height, change]) => {
    const { follow } = await import("/page/composer.js");
    const viewport = Object.assign(new EventTarget(), { height, offsetTop: 0, scale: 1 });
    follow(viewport);
    Object.assign(viewport, change);
    viewport.dispatchEvent(new Event("resize"));
    for (let i = 0; i < 3; i += 1) await new Promise(requestAnimationFrame);
    const [composer, app] = ["composer", "app"]
        .map((id) => document.getElementById(id).getBoundingClientRect());
    return [composer.top, composer.bottom, app.height, document.documentElement.className];
}"""


@pytest.fixture(scope="module", params=["ipad-landscape", "ipad-half", "iphone-se"])
def shared_page(request, pages, scripted):
    """A page of each screen, with an answer."""
    scripted[1].answers = [[WIDE]]
    page = pages(request.param)
    ask(page, "Wide", ends=1)
    return page


@pytest.fixture
def page(shared_page):
    """The same as new."""
    shared_page.reload()
    expect(shared_page.locator(".stats")).to_have_count(1)
    return shared_page


TO_END = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"


def test_nothing_is_too_small_or_sticks_out_or_has_no_name(page):
    viewport = page.locator("meta[name=viewport]").get_attribute("content")
    assert "viewport-fit=cover" in viewport and "user-scalable" not in viewport
    nameless = "button:has(svg):not([title]), .round:not([aria-label])"
    assert page.locator(nameless).count() == 0
    fonts = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select")]
            .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
    )
    assert len(fonts) > 5 and min(fonts) >= 16  # below that iOS zooms in
    tap(page, "Edit the question")
    for opener in (None, ".actions .text", "#open-settings"):
        if opener:
            page.locator(opener).tap()
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
    change, end = {"height": height * 0.55, "offsetTop": 30}, 30 + height * 0.55
    top, bottom, _, name = page.evaluate(VIEWPORT, [height, change])
    assert top > 30 + height * 0.2 and end - 20 < bottom <= end and name == "keyboard"
    assert page.evaluate(TO_END) < 2
