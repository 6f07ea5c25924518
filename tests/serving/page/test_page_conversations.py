"""What people do with a conversation: instructions, other words, files, another model."""

import json
from threading import Event

import pytest
from playwright.sync_api import expect

from mlx_flashhead.chatting.conversation import Message, read_conversation, write_conversation
from page_actions import answers, ask, settings, tap
from scripted_server import INFO, MODEL

OTHER = {"name": "other/Model-4bit", "dense": False, "n_probes": 8, "n_clusters": 64}


@pytest.fixture
def page(open_page):
    """The page of a server on this machine."""
    return open_page("iphone")


def sent(script, number=-1):
    """The messages of a request as (role, content)."""
    return [(m["role"], m["content"]) for m in script.requests[number]["messages"]]


def test_instructions_of_a_conversation_and_of_new_ones(script, page, screenshot):
    ask(page, "One?", ends=1)
    with settings(page):
        page.locator("#system").fill(" Answer like a pirate. ")
    ask(page, "Two?", ends=2)
    assert sent(script, 0) == [("user", "One?")]
    assert sent(script)[:2] == [("system", "Answer like a pirate."), ("user", "One?")]

    page.reload()
    expect(page.locator("#show-system")).to_have_text("Answer like a pirate.")
    screenshot(page, "iphone-light-10-instructions")
    page.locator("#new-chat").tap()
    expect(page.locator("#show-system")).to_be_hidden()
    with settings(page):
        page.locator("#system").fill("Be brief.")
        page.locator("#system-default").tap()
        expect(page.locator("#system-default")).to_be_disabled()
    page.locator("#new-chat").tap()
    ask(page, "Three?", ends=1)
    assert sent(script) == [("system", "Be brief."), ("user", "Three?")]
    page.locator("#show-system").tap()
    expect(page.locator("#system")).to_have_value("Be brief.")
    page.locator("#system").fill("")
    tap(page, "Done")
    page.locator("#new-chat").tap()
    expect(page.locator("#show-system")).to_have_text("Be brief.")


def test_a_question_in_other_words(script, page, screenshot):
    script.answers = [["One."], ["Two."], ["Three."], ["Uno."]]
    for number, question in enumerate(("First?", "Second?", "Third?"), 1):
        ask(page, question, ends=number)
    edit = page.get_by_role("button", name="Edit the question")
    edit.nth(1).tap()
    editor = page.get_by_label("Your question")
    expect(editor).to_have_value("Second?")
    expect(page.locator(".editing")).to_contain_text("below it will be replaced")
    screenshot(page, "iphone-light-11-edit")
    tap(page, "Cancel")
    expect(page.locator(".message.user .body")).to_have_text(["First?", "Second?", "Third?"])

    edit.nth(1).tap()
    editor.fill("  ")
    expect(page.get_by_role("button", name="Ask again")).to_be_disabled()
    editor.fill("In Spanish?")
    tap(page, "Ask again")
    expect(answers(page)).to_have_text(["One.", "Uno."])
    expect(page.locator(".message.user .body")).to_have_text(["First?", "In Spanish?"])
    assert sent(script) == [("user", "First?"), ("assistant", "One."), ("user", "In Spanish?")]
    page.reload()
    expect(answers(page)).to_have_text(["One.", "Uno."])
    edit.nth(1).tap()
    expect(page.locator(".editing")).not_to_contain_text("will be replaced")


def choose_file(page, path, content=None):
    """Chooses a file, after writing its content as JSON."""
    if content is not None:
        path.write_text(json.dumps(content))
    page.locator("#open-history").tap()
    with page.expect_file_chooser() as chooser:
        page.locator("#import").tap()
    chooser.value.set_files(path)


def test_export_and_import(script, page, tmp_path):
    script.answers = [[{"reasoning": "Hm."}, "It is <b>blue</b>."], ["Yes."]]
    expect(page.locator("#export")).to_be_hidden()
    with settings(page):
        page.locator("#system").fill("Be brief.")
    ask(page, "Which colour has the sky?", ends=1)
    with page.expect_download() as download:
        page.locator("#export").tap()
    assert download.value.suggested_filename == "which-colour-has-the-sky.json"
    path = tmp_path / "sky.json"
    download.value.save_as(path)
    content = json.loads(path.read_text())
    assert content["model"] == MODEL["name"]
    stats = content["messages"][2].pop("stats")
    assert stats["tokens"] == 2
    answer = {"role": "assistant", "content": "It is <b>blue</b>.", "reasoning": "Hm."}
    assert content["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which colour has the sky?"},
        answer | {"finish": "stop"},
    ]

    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#open-history").tap()
    tap(page, "Delete the conversation")
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#chats li")).to_have_count(0)
    choose_file(page, path)
    expect(answers(page)).to_have_text("It is <b>blue</b>.")
    expect(page.locator("#show-system")).to_have_text("Be brief.")
    ask(page, "Sure?", ends=2)
    expect(answers(page)).to_have_text(["It is <b>blue</b>.", "Yes."])
    assert sent(script)[0] == ("system", "Be brief.")


def test_a_file_of_the_terminal_chat_is_read(page, tmp_path):
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
    "large": "it has more than 8 MB",
}


def test_a_damaged_file_gets_a_sentence(page, tmp_path, screenshot):
    said = page.evaluate(
        """async (texts) => {
            const { fromFile } = await import("/page/conversation.js");
            texts[texts.indexOf("large")] = " ".repeat((8 << 20) + 1);
            const files = texts.map((text) => new File([text], "notes.json"));
            return Promise.all(files.map((file) => fromFile(file).catch(({ message }) => message)));
        }""",
        [*DAMAGED],
    )
    for sentence, reason in zip(said, DAMAGED.values(), strict=True):
        assert sentence.startswith(f"“notes.json” holds no conversation ({reason}")
    choose_file(page, tmp_path / "notes.json", [])
    expect(page.locator("#note")).to_have_text(said[1])
    expect(page.locator("#welcome")).to_be_visible()
    screenshot(page, "iphone-light-12-damaged-file")
    page.locator("#note").tap()
    expect(page.locator("#note")).to_be_hidden()
    assert page.locator("#chats li").count() == 0


def test_what_a_file_says_does_nothing(page, tmp_path):
    attack = "<img src=x onerror='window.hacked = 1'>"
    path = tmp_path / f"{attack.replace('/', '')}.json"
    answer = dict.fromkeys(("content", "reasoning", "model", "error", "onclick"), attack)
    answer |= {"role": "assistant", "stats": {"tokens": 1, "speed": None, "first": 1}}
    messages = [{"role": "system", "content": attack}, HELLO | {"content": attack}, answer]
    choose_file(page, path, {"messages": messages})
    expect(answers(page)).to_have_text(attack)
    expect(page.locator("#show-system")).to_have_text(attack)
    choose_file(page, path, {})
    expect(page.locator("#note")).to_contain_text("<img")
    assert page.evaluate("window.hacked") is None
    expect(page.locator("main img:not([alt=''])")).to_have_count(0)


def test_a_file_that_takes_long_to_draw_does_not_stop_the_page(page, tmp_path):
    answer = {"role": "assistant", "content": "**a" * 130_000}
    choose_file(page, tmp_path / "stars.json", {"messages": [HELLO, answer]})
    expect(answers(page)).to_contain_text("**a**a")
    page.reload()
    expect(answers(page)).to_contain_text("**a**a")


def test_two_windows_lose_no_message(script, page):
    half = Event()
    script.answers = [["Uno."], ["Due."], ["Tre, ", half, "end."], ["Quattro."]]
    ask(page, "One?", ends=1)
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#open-history").tap()
    other.locator("#chats .open").tap()
    ask(other, "Two?", ends=2)
    page.bring_to_front()  # Chromium draws the others once a second
    expect(answers(page)).to_have_text(["Uno.", "Due."])
    ask(page, "Three?")
    expect(answers(page).last).to_have_text("Tre,")
    other.bring_to_front()
    ask(other, "Four?", ends=3)  # at the same time: both go on, each with its own text
    half.set()
    expect(answers(page)).to_have_text(["Uno.", "Due.", "Tre, end."])
    expect(other.locator("#note")).to_contain_text("both are kept")
    for window in (page, other):
        window.bring_to_front()
        window.reload()
        expect(window.locator("#chats li")).to_have_count(2)
        for number, text in enumerate(("Quattro.", "Tre, end.")):
            window.locator("#open-history").tap()
            window.locator("#chats .open").nth(number).tap()
            expect(answers(window)).to_have_text(["Uno.", "Due.", text])


def test_a_choice_of_models(script, open_page, screenshot):
    script.info = INFO | {"models": [MODEL, OTHER, {"name": "plain"}]}
    page = open_page("ipad")
    choice = page.get_by_label("Model", exact=True)
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    ask(page, "One?")
    expect(page.locator(".stats")).to_contain_text(MODEL["name"])
    choice.select_option(OTHER["name"])
    expect(page.locator("#model")).to_have_text(OTHER["name"])
    with settings(page):
        expect(page.locator("output[for=n_probes]")).to_have_text("8 (default)")
        expect(page.locator("#n_probes")).to_have_attribute("max", "64")
    expect(page.get_by_role("button", name="Compare")).to_have_count(1)
    page.reload()
    expect(page.locator("#model")).to_have_text(OTHER["name"])
    ask(page, "Two?")
    expect(page.locator(".stats").last).to_contain_text(OTHER["name"])
    screenshot(page, "ipad-light-8-models")
    choice.select_option("plain")
    expect(page.get_by_role("button", name="Compare")).to_have_count(0)
    ask(page, "Three?", ends=3)
    assert [body["model"] for body in script.requests] == [MODEL["name"], OTHER["name"], "plain"]
    assert "dense" not in script.requests[-1]

    script.info = INFO  # a server of one model
    page.reload()
    expect(page.locator("#model")).to_have_text(MODEL["name"])
    expect(choice).to_be_hidden()
    ask(page, "Four?", ends=4)
    assert "model" not in script.requests[-1]
