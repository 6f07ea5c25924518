"""The page in a real browser, at the sizes of iPads and iPhones, with touch."""

from threading import Event

import pytest
from playwright.sync_api import expect

from page_actions import answers, ask, settings, tap
from scripted_server import MODEL, TOKEN

ANSWER = """Sunlight is a **mixture of all colours**, of which short waves are scattered *far more*:

1. Red light passes almost straight through.
2. Blue light bounces off the molecules of the air.

```python
def scattering(wavelength_nm: float) -> float:
    return 1 / wavelength_nm**4  # relative
```

| Colour | Wavelength |
|---|---:|
| Red | 700 nm |
"""


@pytest.mark.parametrize(
    "screen, dark", [("ipad", False), ("ipad-landscape", True), ("iphone", True)]
)
def test_ask_and_see_the_stream(lan, script, open_page, screenshot, screen, dark):
    name = f"{screen}-{'dark' if dark else 'light'}"
    half = Event()
    text = [ANSWER[i : i + 6] for i in range(0, len(ANSWER), 6)]
    script.answers = [[*text[:21], half, *text[21:]]]
    page = open_page(screen, f"{lan}?token={TOKEN}", dark=dark)
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    assert not page.evaluate("isSecureContext")
    assert page.url == lan  # the token has left the address bar
    screenshot(page, f"{name}-1-welcome")

    ask(page, "Why is the sky blue?")
    expect(answers(page).locator("ol > li")).to_have_count(1)
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    expect(page.locator(".stats")).to_have_count(0)
    screenshot(page, f"{name}-2-stream")
    half.set()
    expect(page.locator(".stats")).to_contain_text(f"{len(text)} tokens")
    expect(page.locator(".stats")).to_contain_text("35.5 tokens/s")
    expect(page.locator("#send")).to_be_visible()
    expect(answers(page).locator("strong")).to_have_text("mixture of all colours")
    expect(answers(page).locator("pre code")).to_contain_text("    return 1 / wavelength_nm**4")
    expect(answers(page).locator("td")).to_have_text(["Red", "700 nm"])
    assert page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") < 2
    screenshot(page, f"{name}-3-answer")
    assert script.requests[0]["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]


def test_how_much_is_read_and_a_thought_that_is_folded_away(script, open_page, screenshot):
    half, all_of_it = Event(), Event()
    reading = [(512, 4000), half, (2000, 4000), all_of_it]
    script.answers = [[*reading, {"reasoning": "Hmm, "}, {"reasoning": "well."}, "So long."]]
    page = open_page()
    ask(page, "A long text")
    expect(page.locator(".waiting")).to_have_text("12 % read")
    screenshot(page, "iphone-light-9-reading")
    half.set()
    expect(page.locator(".waiting")).to_have_text("50 % read")
    all_of_it.set()
    expect(answers(page)).to_have_text("So long.")
    expect(page.locator(".waiting")).to_have_count(0)
    expect(page.locator(".thinking div")).to_be_hidden()
    page.locator(".thinking summary").tap()
    expect(page.locator(".thinking div")).to_have_text("Hmm, well.")
    ask(page, "More", ends=2)
    assert script.requests[1]["messages"][1] == {"role": "assistant", "content": "So long."}


def test_stop_and_answer_again(script, open_page, screenshot):
    script.answers = [["One, ", "two, ", Event()], ["Un, ", "deux."]]
    page = open_page()
    ask(page, "Count.")
    expect(answers(page)).to_have_text("One, two,")
    page.locator("#stop").tap()
    assert script.left.wait(20)  # the server notices, and stops
    expect(page.locator(".notice")).to_have_text("Stopped before the end.")
    expect(answers(page)).to_have_text("One, two,")
    screenshot(page, "iphone-light-4-stopped")

    tap(page, "Answer again")
    expect(answers(page)).to_have_text(["Un, deux."])
    assert script.requests[1]["messages"] == script.requests[0]["messages"]


def test_conversations_are_found_again(script, open_page, screenshot):
    script.answers = [["First answer."], ["Second answer."]]
    page = open_page()
    ask(page, "First question", ends=1)
    page.locator("#new-chat").tap()
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Second question", ends=1)
    page.locator("#input").fill("a draft")

    page.reload()
    expect(answers(page)).to_have_text("Second answer.")
    expect(page.locator("#input")).to_have_value("a draft")
    page.locator("#open-history").tap()
    expect(page.locator("#chats .name")).to_have_text(["Second question", "First question"])
    screenshot(page, "iphone-light-5-history")
    page.get_by_text("First question").tap()
    expect(answers(page)).to_have_text("First answer.")
    expect(page.locator("#history")).to_be_hidden()


def test_settings_go_into_the_request(script, open_page, screenshot):
    page = open_page()
    ask(page, "Plain", ends=1)
    with settings(page):
        expect(page.locator("output[for=n_probes]")).to_have_text("120 (default)")
        screenshot(page, "iphone-light-8-settings")
        for name, value in {"temperature": "0.7", "top_p": "0.9", "n_probes": "256"}.items():
            page.locator(f"#{name}").fill(value)
            expect(page.locator(f"output[for={name}]")).to_have_text(value)
    page.reload()
    ask(page, "Set", ends=2)
    with settings(page):
        page.locator("#dense").tap()
    ask(page, "Dense", ends=3)
    with settings(page):
        tap(page, "Reset")
    ask(page, "Plain again", ends=4)

    always = {"messages", "stream", "stream_options"}
    chosen = [{k: v for k, v in body.items() if k not in always} for body in script.requests]
    drawn = {"temperature": 0.7, "top_p": 0.9}
    assert chosen == [{}, drawn | {"n_probes": 256}, drawn | {"dense": True}, {}]


def test_copy_without_a_secure_context(lan, script, open_page):
    answer = "Take `this`:\n\n```\ncode\n  indented\n```"
    script.answers = [[answer]]
    page = open_page("ipad", f"{lan}?token={TOKEN}")
    ask(page, "Code", ends=1)
    assert page.evaluate("navigator.clipboard") is None
    for label, text in {"Copy the code": "code\n  indented", "Copy": answer}.items():
        page.locator(".message.assistant").get_by_role("button", name=label, exact=True).tap()
        page.locator("#input").fill("")
        page.locator("#input").press("Control+v")
        assert page.locator("#input").input_value().strip() == text


def test_return_key(script, open_page):
    """A new line on a touch screen, as its keyboard has no other way; ⌘ with it sends."""
    page = open_page("ipad")
    page.locator("#input").press_sequentially("one")
    page.locator("#input").press("Enter")
    page.locator("#input").press_sequentially("two")
    page.locator("#input").press("Meta+Enter")
    expect(page.locator(".message.user .body")).to_have_text("one\ntwo")
    expect(page.locator("#input")).not_to_be_focused()
    expect(page.locator(".stats")).to_be_visible()
    assert script.requests[0]["messages"][0]["content"] == "one\ntwo"
