"""The page when something goes wrong, or many come at once; nothing may be lost."""

import json
from threading import Event

from playwright.sync_api import expect

from mlx_flashhead.serving.network.access import Access
from page_actions import TOKEN, answers, ask
from scripted_server import BREAK, MODEL, Script, scripted_server


def test_reload_in_the_middle_of_an_answer(server, open_page):
    port, script = server
    script.answers = [["Half of ", "it", Event()]]
    page = open_page(f"http://127.0.0.1:{port}/")
    ask(page, "Tell me.")
    expect(answers(page)).to_have_text("Half of it")
    page.reload()
    expect(answers(page)).to_have_text("Half of it")
    expect(page.locator(".notice")).to_have_text("Stopped before the end.")
    assert script.left.wait(20)


def test_wrong_token_then_the_right_one(lan, open_page, screenshot):
    url, _ = lan
    page = open_page(url, "ipad")
    screenshot(page, "ipad-light-6-locked")
    field = page.get_by_label("Token")
    field.fill("xxxx-xxxx-xxxx-xxxx-xxxx")
    page.get_by_role("button", name="Open").tap()
    expect(page.locator(".wrong")).to_contain_text("That is not")
    page.get_by_label("Token").fill(f" {TOKEN} ")
    page.get_by_role("button", name="Open").tap()
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    page.reload()
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    manifest = page.evaluate("document.querySelector('link[rel=manifest]').href")
    assert manifest == f"{url}manifest.webmanifest?token={TOKEN}"


def test_token_that_changes_meanwhile(lan, open_page, screenshot):
    url, script = lan
    script.answers = [["First."], ["Second."]]
    page = open_page(f"{url}?token={TOKEN}", "iphone", dark=True)
    ask(page, "One?")
    expect(page.locator(".stats")).to_be_visible()
    script.access = Access("another-token-of-this-server")
    ask(page, "Two?")
    expect(page.locator("#lock")).to_be_visible()
    page.locator("#token").fill(TOKEN)
    page.locator("#unlock .primary").tap()
    expect(page.locator("#wrong-token")).to_contain_text("That is not")
    screenshot(page, "iphone-dark-6-token")
    page.locator("#token").fill("another-token-of-this-server")
    page.locator("#unlock .primary").tap()
    expect(page.locator("#lock")).to_be_hidden()
    page.get_by_role("button", name="Try again").tap()
    expect(answers(page)).to_have_text(["First.", "Second."])


def test_server_gone_and_back(open_page, screenshot):
    script = Script()
    script.answers = [["Before."], ["Half an ", BREAK]]
    with scripted_server(script) as (port, _):
        page = open_page(f"http://127.0.0.1:{port}/", "ipad")
        ask(page, "One?")
        expect(page.locator(".stats")).to_be_visible()
        ask(page, "Two?")
        expect(page.locator(".notice")).to_contain_text("The answer broke off")
        expect(answers(page)).to_have_text(["Before.", "Half an"])
    ask_again = page.get_by_role("button", name="Try again")
    ask_again.tap()
    expect(page.locator(".notice")).to_contain_text("The server does not answer.")
    expect(page.locator("#banner")).to_contain_text("Your conversations are safe here")
    expect(page.locator(".message.user .body")).to_have_text(["One?", "Two?"])
    screenshot(page, "ipad-light-7-away")

    script.answers = [["After."]]
    with scripted_server(script, port):
        expect(page.locator("#banner")).to_have_text("The server is back.")
        ask_again.tap()
        expect(answers(page)).to_have_text(["Before.", "After."])
        expect(page.locator("#banner")).to_be_hidden()
        page.reload()
        expect(answers(page)).to_have_text(["Before.", "After."])


def test_page_opens_while_the_server_is_away(open_page, screenshot):
    script = Script()
    script.answers = [["So $x^2$."], ["After."]]
    with scripted_server(script) as (port, _):
        page = open_page(f"http://127.0.0.1:{port}/", "ipad", worker=True)
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        ask(page, "One?")
        expect(page.locator(".stats")).to_be_visible()
    page.reload()
    expect(answers(page).locator(".katex")).to_be_visible()
    expect(page.locator("#banner")).to_contain_text("The server does not answer.")
    assert page.evaluate("document.fonts.load('16px KaTeX_Fraktur').then((fonts) => fonts.length)")
    screenshot(page, "ipad-light-10-opened-without-server")
    with scripted_server(script, port):
        expect(page.locator("#banner")).to_have_text("The server is back.")
        ask(page, "Two?")
        expect(answers(page).last).to_have_text("After.")


def test_a_kept_page_does_not_hide_the_token(open_page):
    """The server's refusal comes through, also for a page that the browser has kept."""
    with scripted_server(Script(Access(TOKEN))) as (port, script):
        page = open_page(f"http://127.0.0.1:{port}/?token={TOKEN}", worker=True)
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        addresses = page.evaluate(
            """caches.open("flashhead-page").then((cache) => cache.keys())
                .then((requests) => requests.map(({ url }) => url))"""
        )
        assert len(addresses) > 40 and not any(TOKEN in address for address in addresses)
        assert not any(address.endswith(".json") for address in addresses)
        script.access = Access("another-token-of-this-server")
        page.reload()
        expect(page.get_by_role("heading")).to_have_text("This server needs its token")


def test_refused_request_says_why(server, open_page):
    port, script = server
    script.answers = ["n_probes is 9: it must be at most 4.", ["Fine."]]
    page = open_page(f"http://127.0.0.1:{port}/")
    ask(page, "Well?")
    expect(page.locator(".notice")).to_contain_text("n_probes is 9: it must be at most 4.")
    page.get_by_role("button", name="Try again").tap()
    expect(answers(page)).to_have_text("Fine.")


def test_four_browsers_at_once(lan, open_page):
    url, script = lan
    go = Event()
    script.answers = [[f"part {i}, ", go, "end"] for i in range(4)]
    screens = ("ipad", "iphone", "ipad-landscape", "iphone-se")
    pages = [open_page(f"{url}?token={TOKEN}", screen) for screen in screens]
    for number, page in enumerate(pages):
        ask(page, f"Question {number}")
        expect(answers(page)).to_have_text(f"part {number},")
    go.set()
    for number, page in enumerate(pages):
        expect(answers(page)).to_have_text(f"part {number}, end")
        expect(page.locator("#chats .name")).to_have_text([f"Question {number}"])


QUESTION = {"role": "user", "content": "Hello?"}
STATS = {"tokens": 5, "speed": 9.5, "first": 0.1}
DAMAGED = [
    "",
    "{",
    "null",
    "[]",
    '{"messages": 3}',
    *(
        json.dumps({"id": "x", "updated": 9e12, "messages": [message]})
        for message in (
            None,
            "Hello",
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "user"},
            {"role": 7, "content": "Hello"},
            {"role": "assistant", "content": "Hello", "reasoning": 1},
            {"role": "assistant", "content": "Hello", "error": {}},
            {"role": "assistant", "content": "Hello", "model": 3},
            {"role": "assistant", "content": "Hello", "stats": STATS | {"first": None}},
            {"role": "assistant", "content": "Hello", "stats": STATS | {"speed": "fast"}},
        )
    ),
]


def test_damaged_records_cost_no_other_conversation(server, open_page):
    port, script = server
    script.answers = [["Yes."], ["Again."]]
    page = open_page(f"http://127.0.0.1:{port}/")
    ask(page, "Is this kept?")
    expect(page.locator(".stats")).to_be_visible()
    keep = "([key, text]) => localStorage.setItem(key, text)"
    for number, record in enumerate(DAMAGED):
        page.evaluate(keep, [f"flashhead.chat.damaged{number}", record])
    page.evaluate(keep, ["flashhead.current", "damaged7"])
    for settings in ('"x"', "null", '{"temperature": "hot", "dense": 3, "max_tokens": 9}'):
        page.evaluate(keep, ["flashhead.settings", settings])
        page.reload()
        expect(page.locator("#model")).to_have_text(MODEL["name"])
        expect(page.locator("#chats .name")).to_have_text(["Is this kept?"])
    page.locator("#open-history").tap()
    page.locator("#chats .open").tap()
    expect(answers(page)).to_have_text("Yes.")
    ask(page, "And now?")
    expect(answers(page)).to_have_text(["Yes.", "Again."])
    sent = script.requests[-1]
    assert sent["max_tokens"] == 9 and not {"temperature", "dense"} & sent.keys()


def test_damaged_instructions_cost_no_message(server, open_page):
    port, script = server
    page = open_page(f"http://127.0.0.1:{port}/", "ipad-landscape")
    record = {"updated": 1, "system": {"role": "system"}, "messages": [QUESTION]}
    page.evaluate(
        "([key, text]) => localStorage.setItem(key, text)",
        ["flashhead.chat.old", json.dumps(record)],
    )
    page.reload()
    page.locator("#chats .open").tap()
    expect(page.locator(".message.user .body")).to_have_text("Hello?")
    expect(page.locator("#show-system")).to_be_hidden()
    ask(page, "Well?")
    expect(page.locator(".stats")).to_be_visible()
    assert [m["role"] for m in script.requests[-1]["messages"]] == ["user", "user"]


def test_browser_without_room(server, open_page):
    port, script = server
    page = open_page(f"http://127.0.0.1:{port}/", "ipad-landscape")
    page.evaluate(
        """() => {
            const { setItem } = Storage.prototype;
            Storage.prototype.setItem = function (key, text) {
                if (text.length > 1000) throw new DOMException("full");
                setItem.call(this, key, text);
            };
        }"""
    )
    for number in (1, 2):
        ask(page, f"Long question {number}" + "?" * 1000)
        expect(page.locator(".stats")).to_have_count(number)
    assert len(script.requests[1]["messages"]) == 3
    page.locator("#new-chat").tap()
    ask(page, "A short one?")
    expect(page.locator(".stats")).to_have_count(1)
    expect(page.get_by_text("has no room left")).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the conversation").last.tap()
    expect(page.locator("#full")).to_be_hidden()
