"""What people do with a conversation: instructions, other words, files, another model."""

import json
from threading import Event

import pytest
from playwright.sync_api import expect

from page_actions import answers, ask
from scripted_server import INFO, MODEL

OTHER = {"name": "other/Model-4bit", "dense": False, "n_probes": 8, "n_clusters": 64}
PLAIN = {"name": "plain"}


@pytest.fixture
def page(server, open_page):
    """The page of a server on this machine."""
    return open_page(f"http://127.0.0.1:{server[0]}/", "iphone")


def sent(script, number=-1):
    """The messages of a request as (role, content)."""
    return [(m["role"], m["content"]) for m in script.requests[number]["messages"]]


def set_instructions(page, text, *, default=False):
    page.locator("#open-settings").tap()
    page.locator("#system").fill(text)
    if default:
        page.locator("#system-default").tap()
        expect(page.locator("#system-default")).to_be_disabled()
    page.get_by_role("button", name="Done").tap()


def test_instructions_of_a_conversation_and_of_new_ones(server, page, screenshot):
    script = server[1]
    ask(page, "One?")
    expect(page.locator(".stats")).to_be_visible()
    set_instructions(page, " Answer like a pirate. ")
    ask(page, "Two?")
    expect(page.locator(".stats")).to_have_count(2)
    assert sent(script, 0) == [("user", "One?")]
    assert sent(script)[:2] == [("system", "Answer like a pirate."), ("user", "One?")]

    page.reload()
    expect(page.locator("#show-system")).to_have_text("Answer like a pirate.")
    screenshot(page, "iphone-light-10-instructions")
    page.locator("#new-chat").tap()
    expect(page.locator("#show-system")).to_be_hidden()
    set_instructions(page, "Be brief.", default=True)
    page.locator("#new-chat").tap()
    ask(page, "Three?")
    expect(page.locator(".stats")).to_have_count(1)
    assert sent(script) == [("system", "Be brief."), ("user", "Three?")]
    page.locator("#show-system").tap()
    expect(page.locator("#system")).to_have_value("Be brief.")
    page.locator("#system").fill("")
    page.get_by_role("button", name="Done").tap()
    page.locator("#new-chat").tap()
    expect(page.locator("#show-system")).to_have_text("Be brief.")


def test_a_question_in_other_words(server, page, screenshot):
    script = server[1]
    script.answers = [["One."], ["Two."], ["Three."], ["Uno."]]
    for number, question in enumerate(("First?", "Second?", "Third?"), 1):
        ask(page, question)
        expect(page.locator(".stats")).to_have_count(number)
    edit = page.get_by_role("button", name="Edit the question")
    edit.nth(1).tap()
    editor = page.get_by_label("Your question")
    expect(editor).to_have_value("Second?")
    expect(page.locator(".editing")).to_contain_text("below it will be replaced")
    screenshot(page, "iphone-light-11-edit")
    page.get_by_role("button", name="Cancel").tap()
    expect(page.locator(".message.user .body")).to_have_text(["First?", "Second?", "Third?"])

    edit.nth(1).tap()
    editor.fill("  ")
    expect(page.get_by_role("button", name="Ask again")).to_be_disabled()
    editor.fill("In Spanish?")
    page.get_by_role("button", name="Ask again").tap()
    expect(answers(page)).to_have_text(["One.", "Uno."])
    expect(page.locator(".message.user .body")).to_have_text(["First?", "In Spanish?"])
    assert sent(script) == [("user", "First?"), ("assistant", "One."), ("user", "In Spanish?")]
    page.reload()
    expect(answers(page)).to_have_text(["One.", "Uno."])
    edit.nth(1).tap()
    expect(page.locator(".editing")).not_to_contain_text("will be replaced")


def choose_file(page, path):
    page.locator("#open-history").tap()
    with page.expect_file_chooser() as chooser:
        page.locator("#import").tap()
    chooser.value.set_files(path)


def test_export_and_import(server, page, tmp_path):
    script = server[1]
    script.answers = [[{"reasoning": "Hm."}, "It is <b>blue</b>."], ["Yes."]]
    expect(page.locator("#export")).to_be_hidden()
    set_instructions(page, "Be brief.")
    ask(page, "Which colour has the sky?")
    expect(page.locator(".stats")).to_be_visible()
    with page.expect_download() as download:
        page.locator("#export").tap()
    assert download.value.suggested_filename == "which-colour-has-the-sky.json"
    path = tmp_path / "sky.json"
    download.value.save_as(path)
    content = json.loads(path.read_text())
    assert content["model"] == MODEL["name"]
    stats = content["messages"][2].pop("stats")
    assert stats["tokens"] == 2
    assert content["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which colour has the sky?"},
        {
            "role": "assistant",
            "content": "It is <b>blue</b>.",
            "reasoning": "Hm.",
            "finish": "stop",
        },
    ]

    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#open-history").tap()
    page.get_by_role("button", name="Delete the conversation").tap()
    expect(page.locator("#welcome")).to_be_visible()
    choose_file(page, path)
    expect(answers(page)).to_have_text("It is <b>blue</b>.")
    expect(page.locator("#show-system")).to_have_text("Be brief.")
    page.reload()
    ask(page, "Sure?")
    expect(answers(page)).to_have_text(["It is <b>blue</b>.", "Yes."])
    assert sent(script)[0] == ("system", "Be brief.")


def test_a_file_of_the_terminal_chat_is_read(page, tmp_path):
    from mlx_flashhead.chatting.transcript import Message, read_conversation, write_conversation

    path = tmp_path / "chat.json"
    messages = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello!")]
    write_conversation(path, messages, "tiny")
    choose_file(page, path)
    expect(answers(page)).to_have_text("Hello!")
    with page.expect_download() as download:
        page.locator("#export").tap()
    assert read_conversation(download.value.path()) == messages


HELLO = {"role": "user", "content": "Hello"}
DAMAGED = {
    "{": "it is not JSON",
    "[]": "it has no messages",
    '{"messages": []}': "it has no messages",
    '{"messages": "Hello"}': "it has no messages",
    json.dumps({"messages": [{"role": "system", "content": 3}]}): "its instructions are not text",
    json.dumps({"messages": [HELLO, {"role": "assistant", "content": [1]}]}): "its message 2 is da",
    json.dumps({"messages": [HELLO, {"role": "tool", "content": ""}]}): "its message 2 is damaged",
    json.dumps({"messages": [HELLO, HELLO]}): "its questions and answers do not take turns",
    json.dumps({"messages": [HELLO]}): "its last question has no answer",
    " " * (8 << 20) + "{}": "it has more than 8 MB",
}


def test_a_damaged_file_gets_a_sentence(page, tmp_path, screenshot):
    path = tmp_path / "notes.json"
    for text, reason in DAMAGED.items():
        path.write_text(text)
        choose_file(page, path)
        expect(page.locator("#note")).to_contain_text(
            f"“notes.json” holds no conversation ({reason}"
        )
        expect(page.locator("#welcome")).to_be_visible()
    screenshot(page, "iphone-light-12-damaged-file")
    page.locator("#note").tap()
    expect(page.locator("#note")).to_be_hidden()
    assert page.locator("#chats li").count() == 0


def test_what_a_file_says_does_nothing(page, tmp_path):
    attack = "<img src=x onerror='window.hacked = 1'>"
    path = tmp_path / f"{attack.replace('/', '')}.json"
    answer = {"role": "assistant", "content": attack, "reasoning": attack, "model": attack}
    answer |= {
        "error": attack,
        "stats": {"tokens": 1, "speed": None, "first": 1},
        "onclick": attack,
    }
    messages = [{"role": "system", "content": attack}, HELLO | {"content": attack}, answer]
    path.write_text(json.dumps({"messages": messages}))
    choose_file(page, path)
    expect(answers(page)).to_have_text(attack)
    expect(page.locator("#show-system")).to_have_text(attack)
    path.write_text("{")
    choose_file(page, path)
    expect(page.locator("#note")).to_contain_text("<img")
    assert page.evaluate("window.hacked") is None
    expect(page.locator("main img:not([alt=''])")).to_have_count(0)


def test_a_file_that_takes_long_to_draw_does_not_stop_the_page(page, tmp_path):
    path = tmp_path / "stars.json"
    answer = {"role": "assistant", "content": "**a" * 130_000}
    path.write_text(json.dumps({"messages": [HELLO, answer]}))
    choose_file(page, path)
    expect(answers(page)).to_contain_text("**a**a")
    page.reload()
    expect(answers(page)).to_contain_text("**a**a")


def test_two_windows_lose_no_message(server, page):
    script = server[1]
    half = Event()
    script.answers = [["Uno."], ["Due."], ["Tre, ", half, "end."], ["Quattro."]]
    other = page.context.new_page()
    other.goto(page.url)
    ask(page, "One?")
    expect(page.locator(".stats")).to_be_visible()
    other.locator("#open-history").tap()
    other.locator("#chats .open").tap()
    ask(other, "Two?")
    expect(other.locator(".stats")).to_have_count(2)
    expect(answers(page)).to_have_text(["Uno.", "Due."])
    ask(page, "Three?")
    expect(answers(page).last).to_have_text("Tre,")
    ask(other, "Four?")  # at the same time: both go on, each with its own text
    expect(other.locator(".stats")).to_have_count(3)
    half.set()
    expect(answers(page)).to_have_text(["Uno.", "Due.", "Tre, end."])
    expect(other.locator("#note")).to_contain_text("both are kept")
    for window in (page, other):
        window.reload()
        expect(window.locator("#chats li")).to_have_count(2)
        for number, text in enumerate(("Quattro.", "Tre, end.")):
            window.locator("#open-history").tap()
            window.locator("#chats .open").nth(number).tap()
            expect(answers(window)).to_have_text(["Uno.", "Due.", text])


def test_a_choice_of_models(server, open_page, screenshot):
    port, script = server
    script.info = INFO | {"models": [MODEL, OTHER, PLAIN]}
    page = open_page(f"http://127.0.0.1:{port}/", "ipad")
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    ask(page, "One?")
    expect(page.locator(".stats")).to_contain_text(MODEL["name"])
    page.get_by_label("Model", exact=True).select_option(OTHER["name"])
    expect(page.locator("#model")).to_have_text(OTHER["name"])
    page.locator("#open-settings").tap()
    expect(page.locator("output[for=n_probes]")).to_have_text("8 (default)")
    expect(page.locator("#n_probes")).to_have_attribute("max", "64")
    page.get_by_role("button", name="Done").tap()
    expect(page.get_by_role("button", name="Compare")).to_have_count(1)
    page.reload()
    expect(page.locator("#model")).to_have_text(OTHER["name"])
    ask(page, "Two?")
    expect(page.locator(".stats").last).to_contain_text(OTHER["name"])
    screenshot(page, "ipad-light-8-models")
    page.get_by_label("Model", exact=True).select_option("plain")
    expect(page.get_by_role("button", name="Compare")).to_have_count(0)
    ask(page, "Three?")
    expect(page.locator(".stats")).to_have_count(3)
    assert [body["model"] for body in script.requests] == [MODEL["name"], OTHER["name"], "plain"]
    assert "dense" not in script.requests[-1]

    script.info = INFO  # a server of one model
    page.reload()
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    expect(page.get_by_label("Model", exact=True)).to_be_hidden()
    ask(page, "Four?")
    expect(page.locator(".stats")).to_have_count(4)
    assert "model" not in script.requests[-1]
