"""The same question with FlashHead and with the normal (dense) head, side by side."""

from threading import Event

import pytest
from playwright.sync_api import expect

from page_actions import answers, ask, settings, tap
from scripted_server import INFO, MODEL

BOXES = "(nodes) => nodes.map((node) => node.getBoundingClientRect().toJSON())"
SLOWER = "dense: FlashHead is no faster here"


def sides(page):
    """The texts of FlashHead and dense."""
    return page.locator("#sides .body")


def verdict(page, text):
    expect(page.locator("#verdict")).to_contain_text(text)


def serve(script, **fields):
    """Another decoding of the model from now on."""
    script.info = INFO | {"models": [MODEL | fields]}


@pytest.fixture
def first_answer(script, open_page):
    """A page with an answer: screen → page. Other answers follow."""

    def first_answer(screen, *following):
        script.answers = [["First."], *following]
        page = open_page(screen)
        ask(page, "Why?", ends=1)
        return page

    return first_answer


@pytest.mark.parametrize("screen", ["ipad", "iphone"])
def test_equal_texts(script, first_answer, screen):
    half = Event()
    text = ["Because ", "$E = mc^2$", " holds."]
    page = first_answer(screen, [*text[:2], half, text[2]], text)
    tap(page, "Compare")
    expect(sides(page).first).to_contain_text("Because")
    expect(page.locator("#verdict")).to_have_text("FlashHead answers …")
    expect(sides(page).last).to_be_empty()
    # The dense answer follows.
    assert len(script.requests) == 2
    half.set()
    verdict(page, "The texts are equal. FlashHead has 1.42 times the speed")
    expect(page.locator("#sides .speed")).to_have_text(["35.5 tokens/s", "25.0 tokens/s"])
    expect(page.locator("#sides small")).to_contain_text(["verified · 3", "dense · 3"])
    expect(sides(page).locator(".katex")).to_have_count(2)
    # Both are measured at one moment.
    left, right = page.locator("#sides article").evaluate_all(BOXES)
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    assert right["x"] + right["width"] <= page.viewport_size["width"]
    tap(page, "Done")
    # The conversation is as it was.
    expect(answers(page)).to_have_text("First.")
    assert [body.get("dense") for body in script.requests] == [None, False, True]
    assert all(body["messages"] == script.requests[0]["messages"] for body in script.requests)
    assert not any(body.keys() & {"seed", "n_probes"} for body in script.requests)


def test_a_dense_model_is_not_compared_with_itself(script, first_answer):
    serve(script, decoding=SLOWER, flash_head=SLOWER)
    page = first_answer("iphone")
    expect(page.locator("#mode")).to_have_text("· dense")
    expect(page.locator(".stats")).to_contain_text("25.0 tokens/s · dense · 1 token")
    with settings(page):
        expect(page.locator("#decoding")).to_contain_text("(FlashHead is no faster here)")
    tap(page, "Compare")
    verdict(page, "(dense) head: FlashHead is no faster here. There is nothing to compare")
    assert len(script.requests) == 1
    tap(page, "Compare with FlashHead forced on")
    verdict(page, "The texts are equal. FlashHead, forced on, has 1.42 times the speed")
    expect(page.locator("#sides small")).to_contain_text(["forced on · verified", "dense"])
    forced, dense = script.requests[1:]
    assert (forced["dense"], forced["n_probes"]) == (False, MODEL["n_probes"])
    assert dense["dense"] and "n_probes" not in dense
    tap(page, "Done")

    # Its FlashHead is used meanwhile.
    serve(script)
    tap(page, "Compare")
    verdict(page, "The texts are equal. FlashHead has 1.42 times the speed")
    # What an answer reports comes before what was announced.
    for decoding, said in (
        (SLOWER, "FlashHead is no faster here. There is nothing to compare."),
        ("unverified", "Unverified, FlashHead has"),
    ):
        tap(page, "Done")
        serve(script, decoding=decoding)
        tap(page, "Compare")
        verdict(page, said)


def test_texts_that_part_a_refusal_and_the_seed_of_random_draws(script, first_answer):
    texts = ["One two ", "three."], ["One two ", "four."]
    page = first_answer("ipad", ["One."], "The answer has failed.", *texts, ["Other."], ["Texts."])
    with settings(page):
        page.locator("#temperature").fill("0.7")
        page.locator("#dense").tap()
    tap(page, "Compare")
    expect(page.locator("#sides .notice")).to_contain_text("The answer has failed.")
    tap(page, "Try again")
    verdict(page, "The first 2 words are equal.")
    expect(page.locator("#sides .notice")).to_have_count(0)
    page.get_by_role("button", name="Again", exact=True).tap()
    verdict(page, "The texts differ from the first word.")
    expect(sides(page)).to_have_text(["Other.", "Texts."])
    flash, dense = script.requests[-2:]
    assert flash["seed"] == dense["seed"] and flash["temperature"] == dense["temperature"] == 0.7
    assert (flash["dense"], dense["dense"]) == (False, True)


def test_closing_ends_the_answer_and_one_in_progress_comes_first(script, first_answer):
    page = first_answer("iphone", ["Half ", Event()], ["Again."], ["Again."], ["Growing", Event()])
    tap(page, "Compare")
    expect(sides(page).first).to_have_text("Half")
    tap(page, "Done")
    assert script.left.wait(60)
    tap(page, "Compare")
    expect(sides(page)).to_have_text(["Again.", "Again."])
    assert len(script.requests) == 4
    tap(page, "Done")
    ask(page, "More?")
    expect(answers(page).last).to_have_text("Growing")
    page.get_by_role("button", name="Compare").first.tap()
    expect(page.locator("#note")).to_contain_text("An answer is still growing")
    expect(page.locator("#compare")).to_be_hidden()
