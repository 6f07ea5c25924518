"""The page in a real browser: questions, answers, settings, keys."""

from itertools import cycle
from pathlib import Path
from threading import Event

import pytest
from playwright.sync_api import expect

from page_actions import answers, ask, becomes, settings, tap
from scripted_server import INFO, MODEL, TOKEN

SCREENSHOTS = Path(__file__).parents[3] / "screenshots"
SCREENS = ("macbook", "ipad", "ipad-half", "iphone-se")
ANSWER = """Sunlight is a **mixture of all colours**, of which short waves are scattered *far more*:

1. Red light passes almost straight through.
2. Blue light bounces off the molecules of the air.

```python
def scattering(wavelength_nm: float) -> float:
    return 1 / wavelength_nm**4  # relative
```
|Colour|Wavelength|
|---|---:|
|Red|700 nm|

$$I \\propto \\frac{1}{\\lambda^4}$$"""


@pytest.mark.parametrize("screen, dark", [*zip(SCREENS, cycle([True, False]), strict=False)])
def test_ask_and_see_the_stream(lan, script, open_page, screen, dark):
    """And pictures of everything, for people to look at."""

    def picture(name):
        theme = "dark" if dark else "light"
        path = SCREENSHOTS / f"{screen}-{theme}-{name}.png"
        page.screenshot(path=path, animations="disabled")

    half = Event()
    text = [ANSWER[i : i + 6] for i in range(0, len(ANSWER), 6)]
    script.answers = [[*text[:21], half, *text[21:]], text, text]
    page = open_page(screen, f"{lan}?token={TOKEN}", dark=dark)
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    expect(page.locator("#mode")).to_have_text("· verified")
    assert not page.evaluate("isSecureContext")
    # The token has left the address bar.
    assert page.url == lan
    picture("1-welcome")

    ask(page, "Why is the sky blue?")
    expect(answers(page).locator("ol > li")).to_have_count(1)
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    expect(page.locator("article[aria-busy=true] h2")).to_have_text("Answer")
    picture("2-stream")
    half.set()
    figures = f"35.5 tokens/s · verified · {len(text)} tokens"
    expect(page.locator(".stats")).to_contain_text(figures)
    expect(page.locator("#send")).to_be_visible()
    # VoiceOver reads them.
    expect(page.locator("article > h2")).to_have_text(["You", "Answer"])
    expect(answers(page).locator("pre code")).to_contain_text("    return 1 / wavelength_nm**4")
    expect(answers(page).locator("td")).to_have_text(["Red", "700 nm"])
    becomes(page, "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 2")
    picture("3-answer")
    assert script.requests[0]["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]

    if page.locator("#open-history").is_visible():
        page.locator("#open-history").click()
    picture("4-conversations")
    page.keyboard.press("Escape")
    page.locator("#open-settings").click()
    picture("5-settings")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#verdict")).to_contain_text("The texts are equal.")
    picture("6-compare")


def test_how_much_is_read_and_a_thought_that_is_folded_away(script, page):
    half = Event()
    whole = Event()
    reading = [(512, 4000), half, (2000, 4000), whole]
    script.answers = [[*reading, {"reasoning": "Hmm, "}, {"reasoning": "well."}, "So long."]]
    ask(page, "A long text")
    expect(page.locator(".waiting")).to_have_text("12 % read")
    half.set()
    expect(page.locator(".waiting")).to_have_text("50 % read")
    whole.set()
    expect(answers(page)).to_have_text("So long.")
    expect(page.locator(".thinking div")).to_be_hidden()
    page.locator(".thinking summary").tap()
    expect(page.locator(".thinking div")).to_have_text("Hmm, well.")
    ask(page, "More", ends=2)
    assert script.requests[1]["messages"][1] == {"role": "assistant", "content": "So long."}


def test_keys(script, open_page):
    """The text box has the focus with a keyboard; Escape stops an answer unless it ends something
    else; Ctrl-K, ⌘K on a Mac, begins a conversation."""
    script.answers = [["First."], ["Half ", Event()]]
    page = open_page("macbook")
    box = page.locator("#input")
    expect(box).to_be_focused()
    page.keyboard.type("One?\n")
    expect(page.locator(".stats")).to_have_count(1)
    page.keyboard.type("Two?\n")
    expect(answers(page).last).to_have_text("Half")
    rename = page.locator("li.current").get_by_role("button", name="Rename “One?”")
    for begin in (page.locator("#open-settings"), rename):
        begin.click()
        page.keyboard.press("Escape")
        expect(page.locator("#settings, #chats input").locator("visible=true")).to_have_count(0)
        expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    assert script.left.wait(60)
    expect(page.locator(".notice")).to_have_text("Stopped before the end.")
    page.keyboard.press("Control+k")
    expect(page.locator("#welcome")).to_be_visible()
    expect(box).to_be_focused()


def test_return_key_of_a_touch_screen(script, open_page):
    """A new line, as its keyboard has no other way; ⌘ with it sends. The keyboard stays away."""
    page = open_page("ipad")
    box = page.locator("#input")
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    expect(box).not_to_be_focused()
    for text, key in {"one": "Enter", "two": "Meta+Enter"}.items():
        box.press_sequentially(text)
        box.press(key)
    expect(page.locator(".message.user .body")).to_have_text("one\ntwo")
    expect(box).not_to_be_focused()


def test_settings_go_into_the_request(script, page):
    ask(page, "Plain", ends=1)
    with settings(page):
        expect(page.locator("#decoding")).to_contain_text("Verified: FlashHead proposes")
        expect(page.locator("output[for=max_tokens]")).to_have_text("512 (default)")
        for name, value in {"temperature": "0.7", "top_p": "0.9"}.items():
            page.locator(f"#{name}").fill(value)
            expect(page.locator(f"output[for={name}]")).to_have_text(value)
        page.locator("#max_tokens").fill("4")
        expect(page.locator("output[for=max_tokens]")).to_have_text("1,024")
    page.reload()
    ask(page, "Set", ends=2)
    with settings(page):
        page.locator("#dense").tap()
        expect(page.locator("#decoding")).to_contain_text("Dense: the normal head")
    expect(page.locator("#mode")).to_have_text("· dense")
    ask(page, "Dense", ends=3)
    with settings(page):
        tap(page, "Reset")
    ask(page, "Plain again", ends=4)

    for body in script.requests:
        for name in ("messages", "stream", "stream_options"):
            del body[name]
    drawn = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 1024}
    assert script.requests == [{}, drawn, drawn | {"dense": True}, {}]


def test_an_answer_may_be_as_long_as_the_context(script, open_page):
    """Unless the server or the user says otherwise, and the page says how long that is."""
    script.info = INFO | {"max_tokens": None, "models": [MODEL | {"context": 3000}]}
    page = open_page()
    shown = page.locator("output[for=max_tokens]")
    with settings(page):
        expect(shown).to_have_text("3,000 (default)")
        expect(page.locator("#context")).to_have_text(
            "Question and answer together have at most 3,000."
        )
        assert page.locator("#max_tokens").input_value() == page.locator(
            "#max_tokens"
        ).get_attribute("max")
        page.locator("#max_tokens").fill("5")
        expect(shown).to_have_text("2,048")
        page.locator("#max_tokens").fill("6")
        expect(shown).to_have_text("3,000")
    ask(page, "Long", ends=1)
    assert script.requests[0]["max_tokens"] == 3000


SHOWN = """[getComputedStyle(document.documentElement).backgroundColor,
    ...[...document.querySelectorAll("meta[name=theme-color]")]
        .filter(({ media }) => matchMedia(media).matches).map(({ dataset }) => dataset.theme)]"""


def test_appearance(page):
    """The choice stays, and comes before the system's."""
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 23)"}
    for choice, system, shown in (
        ("System", "dark", "dark"),
        ("Light", "dark", "light"),
        ("Dark", "light", "dark"),
    ):
        page.emulate_media(color_scheme=system)
        with settings(page):
            page.get_by_label(choice).check()
        for _ in range(2):
            becomes(page, SHOWN, [grounds[shown], shown])
            page.reload()


def test_copy_without_a_secure_context(lan, script, open_page):
    answer = "Take `this`:\n\n```\ncode\n  indented\n```"
    script.answers = [[answer]]
    page = open_page("ipad", f"{lan}?token={TOKEN}")
    ask(page, "Code", ends=1)
    assert page.evaluate("navigator.clipboard") is None
    message = page.locator(".message.assistant")
    for label, text in (("Copy the code", "code\n  indented"), ("Copy", answer)):
        message.get_by_role("button", name=label, exact=True).tap()
        page.locator("#input").fill("")
        page.locator("#input").press("Control+v")
        assert page.locator("#input").input_value().strip() == text


SMALL = ("temperature", "top_p", "max_tokens", "dense")
WIDE = "A_very_long_word_" * 30 + "\n\n```\n" + "code " * 100 + "\n```\n\n|a|b|\n|-|-|\n|"
WIDE += "x" * 300 + "|y|\n\nand long" + "\n\nand long" * 20


@pytest.mark.parametrize("screen", ["ipad-landscape", "ipad-half", "iphone-se"])
def test_nothing_is_too_small_or_sticks_out_or_has_no_name(script, open_page, screen):
    script.answers = [[WIDE]]
    page = open_page(screen)
    ask(page, "Wide", ends=1)
    viewport = page.locator("meta[name=viewport]").get_attribute("content")
    assert "viewport-fit=cover" in viewport and "user-scalable" not in viewport
    nameless = "button:has(svg):not([title]), .round:not([aria-label])"
    assert page.locator(nameless).count() == 0
    fonts = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select")]
            .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
    )
    # Below 16 pixels iOS zooms in.
    assert len(fonts) > 5 and min(fonts) >= 16
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
            smallest = 32 if name in SMALL else 43
            assert min(box["width"], box["height"]) >= smallest, name
            assert box["left"] >= 0 and box["right"] <= page.viewport_size["width"], name
        page.evaluate("document.querySelector('dialog[open]')?.close()")
    becomes(page, "scroller.scrollWidth <= scroller.clientWidth")
    becomes(page, "document.documentElement.scrollWidth <= innerWidth")
