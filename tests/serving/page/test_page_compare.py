"""The same question with FlashHead and dense, side by side."""

from threading import Event

import pytest
from playwright.sync_api import expect

from page_actions import answers, ask, settings, tap


def sides(page):
    """The texts of FlashHead and dense."""
    return page.locator("#sides .body")


def verdict(page, text):
    expect(page.locator("#verdict")).to_contain_text(text)


@pytest.fixture
def asked(script, open_page):
    """A page with an answer: screen → page. Other answers follow."""

    def asked(screen, *following, dark=False):
        script.answers = [["First."], *following]
        page = open_page(screen, dark=dark)
        ask(page, "Why?", ends=1)
        return page

    return asked


@pytest.mark.parametrize("screen, dark", [("ipad", False), ("iphone", True)])
def test_equal_texts(script, asked, screenshot, screen, dark):
    half = Event()
    text = ["Because ", "$E = mc^2$", " holds."]
    page = asked(screen, [*text[:2], half, text[2]], text, dark=dark)
    tap(page, "Compare")
    expect(sides(page).first).to_contain_text("Because")
    expect(page.locator("#verdict")).to_have_text("FlashHead answers …")
    expect(sides(page).last).to_be_empty()
    assert len(script.requests) == 2  # dense has not been asked yet
    half.set()
    verdict(page, "The texts are equal.")
    verdict(page, "FlashHead has 1.42 times the speed")
    expect(page.locator("#sides .speed")).to_have_text(["35.5 tokens/s", "25.0 tokens/s"])
    expect(page.locator("#sides small")).to_contain_text(["3 tokens"] * 2)
    expect(sides(page).locator(".katex")).to_have_count(2)
    boxes = [side.bounding_box() for side in page.locator("#sides article").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    assert boxes[1]["x"] + boxes[1]["width"] <= page.viewport_size["width"]
    screenshot(page, f"{screen}-{'dark' if dark else 'light'}-13-compare")
    tap(page, "Done")
    expect(answers(page)).to_have_text("First.")  # the conversation is as it was
    assert [body.get("dense") for body in script.requests] == [None, False, True]
    assert all(body["messages"] == script.requests[0]["messages"] for body in script.requests)
    assert not any("seed" in body for body in script.requests)


def test_texts_that_part_and_a_refusal(asked):
    texts = ["One two ", "three."], ["One two ", "four."]
    page = asked("ipad", ["One."], "The answer has failed.", *texts, ["Other."], ["Texts."])
    tap(page, "Compare")
    expect(page.locator("#sides .notice")).to_contain_text("The answer has failed.")
    tap(page, "Try again")
    verdict(page, "The first 2 words are equal.")
    expect(page.locator("#sides .notice")).to_have_count(0)
    page.get_by_role("button", name="Again", exact=True).tap()
    verdict(page, "The texts differ from the first word.")
    expect(sides(page)).to_have_text(["Other.", "Texts."])


def test_random_draws_have_the_same_seed(script, asked):
    page = asked("ipad")
    with settings(page):
        page.locator("#temperature").fill("0.7")
        page.locator("#n_probes").fill("256")
        page.locator("#dense").tap()
    tap(page, "Compare")
    verdict(page, "The texts are equal.")
    flash, dense = script.requests[1:]
    assert flash["seed"] == dense["seed"] and flash["temperature"] == dense["temperature"] == 0.7
    assert (flash["dense"], flash["n_probes"]) == (False, 256)
    assert dense["dense"] and "n_probes" not in dense


def test_closing_ends_the_answer_and_one_in_progress_comes_first(script, asked):
    page = asked("iphone", ["Half ", Event()], ["Again."], ["Again."], ["Growing", Event()])
    tap(page, "Compare")
    expect(sides(page).first).to_have_text("Half")
    tap(page, "Done")
    assert script.left.wait(20)
    tap(page, "Compare")
    expect(sides(page)).to_have_text(["Again.", "Again."])
    assert len(script.requests) == 4
    tap(page, "Done")
    ask(page, "More?")
    expect(answers(page).last).to_have_text("Growing")
    page.get_by_role("button", name="Compare").first.tap()
    expect(page.locator("#note")).to_contain_text("An answer is still growing")
    expect(page.locator("#compare")).to_be_hidden()
