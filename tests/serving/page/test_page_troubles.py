"""The page when something goes wrong, or many come at once; nothing may be lost."""

import json
import re
from pathlib import Path
from threading import Event

from playwright.sync_api import expect

from mlx_flashhead.serving.access import Access
from page_actions import answers, ask, tap
from scripted_server import BREAK, INFO, MODEL, TOKEN, Script, scripted_server

SCREENSHOTS = Path(__file__).parents[3] / "screenshots"
OTHER_TOKEN = "another-token-of-this-server"


def test_stop_reload_and_refusal_of_an_answer(script, page):
    refusal = "max_tokens is 9: it must be at most 4."
    script.answers = [["One, ", Event()], ["Half of ", "it", Event()], refusal, ["Fine."]]
    ask(page, "Tell me.")
    expect(answers(page)).to_have_text("One,")
    page.locator("#stop").tap()
    # The server notices, and stops.
    assert script.left.wait(60)
    expect(page.locator(".notice")).to_have_text("Stopped before the end.")
    script.left.clear()
    tap(page, "Answer again")
    expect(answers(page)).to_have_text("Half of it")
    assert script.requests[1]["messages"] == script.requests[0]["messages"]
    page.reload()
    expect(answers(page)).to_have_text("Half of it")
    expect(page.locator(".notice")).to_have_text("Stopped before the end.")
    assert script.left.wait(60)
    ask(page, "Well?")
    expect(page.locator(".notice").last).to_contain_text(refusal)
    tap(page, "Try again")
    expect(answers(page)).to_have_text(["Half of it", "Fine."])


def test_a_question_while_the_model_loads_is_sent_when_it_can_be(script, open_page):
    script.loading = True
    script.answers = [["Here ", "it is."], "The server failed.", ["Fine."]]
    page = open_page("small")
    banner = page.locator("#banner")
    expect(banner).to_have_text("Loading the model …")
    expect(banner).not_to_have_class(re.compile("wrong"))
    page.screenshot(path=SCREENSHOTS / "small-1-loading.png")
    ask(page, "One?")
    expect(page.locator(".waiting")).to_have_text("Loading the model …")
    expect(page.locator(".notice")).to_have_count(0)
    page.screenshot(path=SCREENSHOTS / "small-2-question-while-loading.png")
    script.loading = False
    expect(answers(page)).to_have_text("Here it is.")
    expect(banner).to_be_hidden()
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    assert {request["messages"][0]["content"] for request in script.requests} == {"One?"}
    ask(page, "Two?")
    expect(page.locator(".notice")).to_contain_text("The server failed.")
    again = page.get_by_role("button", name=re.compile("again", re.IGNORECASE))
    # There is one way to try it again.
    expect(again).to_have_count(1)
    page.screenshot(path=SCREENSHOTS / "small-3-failure.png")
    again.tap()
    expect(answers(page)).to_have_text(["Here it is.", "Fine."])


def test_a_question_that_waits_for_the_model_can_be_stopped(script, page):
    script.loading = True
    ask(page, "One?")
    expect(page.locator(".waiting")).to_have_text("Loading the model …")
    page.locator("#stop").tap()
    expect(page.locator(".notice")).to_have_text("Stopped before the end.")
    n_requests = len(script.requests)
    script.loading = False
    ask(page, "Two?", ends=1)
    assert len(script.requests) == n_requests + 1


def test_the_header_says_how_the_next_answer_is_decoded(script, page):
    """A FlashHead that has been built is known after the next answer."""
    dense = MODEL | {"decoding": "dense: its FlashHead is being built"}
    script.info = INFO | {"models": [dense]}
    page.reload()
    expect(page.locator("#mode")).to_have_text("· dense")
    script.info = INFO
    ask(page, "One?", ends=1)
    expect(page.locator("#mode")).to_have_text("· verified")


def test_a_wrong_token_and_one_that_changes_meanwhile(lan, script, open_page):
    script.answers = [["First."], ["Second."]]
    page = open_page("ipad", lan)
    page.get_by_label("Token").fill("xxxx-xxxx-xxxx-xxxx-xxxx")
    tap(page, "Open")
    expect(page.locator(".wrong")).to_contain_text("That is not")
    page.get_by_label("Token").fill(f" {TOKEN} ")
    tap(page, "Open")
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    page.reload()
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    # It is read after each answer.
    with page.expect_response("**/page/info.json"):
        ask(page, "One?", ends=1)
    script.access = Access(OTHER_TOKEN)
    ask(page, "Two?")
    page.locator("#token").fill(OTHER_TOKEN)
    page.locator("#unlock .primary").tap()
    expect(page.locator("#lock")).to_be_hidden()
    tap(page, "Try again")
    expect(answers(page)).to_have_text(["First.", "Second."])


CACHED = """caches.open("flashhead-page").then((cache) => cache.keys())
    .then((requests) => requests.map(({ url }) => url))"""


def test_server_gone_and_back(open_page):
    """The page that the browser has cached opens meanwhile, but does not hide a new token."""
    script = Script()
    seen = Event()
    script.access = Access(TOKEN)
    script.answers = [["So $x^2$."], ["Half an ", seen, BREAK]]
    with scripted_server(script) as (port, _):
        page = open_page("ipad", f"http://127.0.0.1:{port}/?token={TOKEN}", worker=True)
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        addresses = page.evaluate(CACHED)
        assert len(addresses) > 40 and not re.search(rf"{TOKEN}|\.json\b", " ".join(addresses))
        ask(page, "One?", ends=1)
        ask(page, "Two?")
        expect(answers(page).last).to_have_text("Half an")
        seen.set()
        expect(page.locator(".notice")).to_contain_text("The answer broke off")
    tap(page, "Try again")
    expect(page.locator(".notice")).to_contain_text("The server does not answer.")
    expect(page.locator("#banner")).to_contain_text("Your conversations are safe here")
    page.reload()
    expect(page.locator(".message.user .body")).to_have_text(["One?", "Two?"])
    expect(answers(page).locator(".katex")).to_be_visible()
    expect(page.locator("#banner")).to_contain_text("The server does not answer.")
    assert page.evaluate("document.fonts.load('16px KaTeX_Fraktur').then((fonts) => fonts.length)")
    script.answers = [["After."]]
    with scripted_server(script, port):
        expect(page.locator("#banner")).to_have_text("The server is back.")
        tap(page, "Try again")
        expect(answers(page).last).to_have_text("After.")
        script.access = Access(OTHER_TOKEN)
        page.reload()
        expect(page.get_by_role("heading")).to_have_text("This server needs its token")


QUESTION = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello"}
STATS = {"tokens": 5, "speed": 9.5, "first": 0.1}
DAMAGED_MESSAGES = [
    None,
    *(QUESTION | field for field in ({"content": [{"type": "text"}]}, {"role": 7})),
    *(ANSWER | field for field in ({"reasoning": 1}, {"error": {}}, {"model": 3}, {"decoding": 1})),
    ANSWER | {"stats": STATS | {"speed": "fast"}},
]
DAMAGED = ["", "{", "null", "[]", '{"messages": 3}']
DAMAGED += [json.dumps({"updated": 9e12, "messages": [damaged]}) for damaged in DAMAGED_MESSAGES]


def test_damaged_records_cost_no_other_conversation(script, open_page):
    script.answers = [["Yes."], ["Again."]]
    page = open_page("ipad-landscape")
    ask(page, "Is this kept?", ends=1)
    no_text = {"updated": 1, "system": {"role": "system"}, "title": 3, "messages": [QUESTION]}
    records = {f"chat.damaged{number}": record for number, record in enumerate(DAMAGED)}
    records |= {"chat.instructions": json.dumps(no_text), "current": "damaged7"}
    for settings in ('"x"', "null", '{"temperature": "hot", "theme": 3, "max_tokens": 9}'):
        page.evaluate(
            """(records) => Object.entries(records)
                .forEach(([key, text]) => localStorage.setItem(`flashhead.${key}`, text))""",
            records | {"settings": settings},
        )
        page.reload()
        expect(page.locator("#model")).to_have_text(MODEL["name"])
        expect(page.locator("#chats .name")).to_have_text(["Is this kept?", "Hello?"])
    page.locator("#chats .open").first.tap()
    ask(page, "And now?")
    expect(answers(page)).to_have_text(["Yes.", "Again."])
    sent = script.requests[-1]
    assert sent["max_tokens"] == 9 and not {"temperature", "dense"} & sent.keys()
