"""What people do with conversations: instructions, other words, names, files, another model."""

import json
import re
from operator import itemgetter
from pathlib import Path
from threading import Event

import pytest
from playwright.sync_api import expect

from mlx_flashhead.chatting.conversation import Message, read_conversation, write_conversation
from page_actions import answers, ask, becomes, settings, tap
from scripted_server import INFO, MODEL

SCREENSHOTS = Path(__file__).parents[3] / "screenshots"
OTHER = MODEL | {"name": "other/Model-4bit", "decoding": "unverified"}
PLAIN = {"name": "plain", "dense": False, "decoding": "dense: its FlashHead is being built"}
HELLO = {"role": "user", "content": "Hello"}


def sent(script, number=-1):
    """The messages of a request as (role, content)."""
    return [(m["role"], m["content"]) for m in script.requests[number]["messages"]]


def open_list(page):
    page.locator("#open-history").tap()
    return page.locator("#chats .name").locator("visible=true")


def test_instructions_of_a_conversation_and_of_new_ones(script, page):
    shown = page.locator("#show-system")
    area = page.locator("#system")
    ask(page, "One?", ends=1)
    with settings(page):
        area.fill(" Answer like a pirate. ")
    ask(page, "Two?", ends=2)
    assert sent(script)[:2] == [("system", "Answer like a pirate."), ("user", "One?")]
    page.reload()
    expect(shown).to_have_text("Answer like a pirate.")
    page.locator("#new-chat").tap()
    expect(shown).to_be_hidden()
    with settings(page):
        area.fill("Be brief.")
        page.locator("#system-default").tap()
    page.locator("#new-chat").tap()
    ask(page, "Three?", ends=1)
    assert sent(script) == [("system", "Be brief."), ("user", "Three?")]


def test_a_question_in_other_words(script, page):
    script.answers = [["One."], ["Two."], ["Three."], ["Uno."]]
    questions = page.locator(".message.user .body")
    editing = page.locator(".editing")
    for number, question in enumerate(("First?", "Second?", "Third?"), 1):
        ask(page, question, ends=number)
    edit = page.get_by_role("button", name="Edit the question").nth(1)
    edit.tap()
    editor = page.get_by_label("Your question")
    expect(editor).to_have_value("Second?")
    expect(editing).to_contain_text("below it will be replaced")
    tap(page, "Cancel")
    expect(questions).to_have_text(["First?", "Second?", "Third?"])
    edit.tap()
    editor.fill("  ")
    expect(page.get_by_role("button", name="Ask again")).to_be_disabled()
    editor.fill("In Spanish?")
    tap(page, "Ask again")
    expect(answers(page)).to_have_text(["One.", "Uno."])
    assert sent(script) == [("user", "First?"), ("assistant", "One."), ("user", "In Spanish?")]


def test_conversations_are_named_and_found(script, page):
    script.answers = [["It is Paris."], ["It is Rome."]]
    ask(page, "France", ends=1)
    page.locator("#new-chat").tap()
    ask(page, "Italy", ends=1)
    page.locator("#input").fill("a draft")
    page.reload()
    expect(answers(page)).to_have_text("It is Rome.")
    expect(page.locator("#input")).to_have_value("a draft")
    names = open_list(page)
    queries = {"RIS  it": ["France"], "italy": ["Italy"], "zebra": [], "is": ["Italy", "France"]}
    for text, matches in queries.items():
        page.locator("#search").fill(text)
        expect(names).to_have_text(matches)
        expect(page.locator("#nothing-found")).to_be_visible(visible=not matches)
    for name, title in {"  <b>  Capitals ": "<b> Capitals", " ": "Italy", "Home": "Home"}.items():
        tap(page, "Rename “")
        page.get_by_label("Name of the conversation").fill(name)
        page.keyboard.press("Enter")
        expect(names.first).to_have_text(title)
        page.locator("#search").fill("")
    page.reload()
    expect(page.locator("#title")).to_have_text("Home")
    expect(open_list(page)).to_have_text(["Home", "France"])
    page.get_by_text("France").tap()
    expect(answers(page)).to_have_text("It is Paris.")


def choose_file(page, path, content=None):
    """Chooses a file, after writing its content as JSON."""
    if content is not None:
        path.write_text(json.dumps(content))
    page.locator("#open-history").tap()
    with page.expect_file_chooser() as chooser:
        page.locator("#import").tap()
    chooser.value.set_files(path)


def export(page):
    with page.expect_download() as download:
        page.locator("#export").tap()
    return download.value


def test_export_and_import(script, page, tmp_path):
    script.answers = [[{"reasoning": "Hm."}, "It is <b>blue</b>."], ["Yes."]]
    expect(page.locator("#export")).to_be_hidden()
    with settings(page):
        page.locator("#system").fill("Be brief.")
    ask(page, "Which colour?", ends=1)
    page.locator("#open-history").tap()
    tap(page, "Rename “Which colour?”")
    page.keyboard.type("The sky\n")
    tap(page, "Close the list")
    download = export(page)
    path = tmp_path / "sky.json"
    assert download.suggested_filename == "the-sky.json"
    download.save_as(path)
    content = json.loads(path.read_text())
    assert content["model"] == MODEL["name"] and content["title"] == "The sky"
    assert [*map(itemgetter("content"), content["messages"][:2])] == ["Be brief.", "Which colour?"]
    answer = {"role": "assistant", "content": "It is <b>blue</b>.", "reasoning": "Hm."}
    answer |= {"finish": "stop", "decoding": "verified"}
    assert answer.items() <= content["messages"][2].items()
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#open-history").tap()
    tap(page, "Delete “The sky”")
    page.reload()
    expect(page.locator("#chats li")).to_have_count(0)
    choose_file(page, path)
    expect(page.locator("#title")).to_have_text("The sky")
    ask(page, "Sure?", ends=2)
    assert sent(script)[0] == ("system", "Be brief.")

    messages = [Message(**HELLO), Message(role="assistant", content="Hello!")]
    write_conversation(tmp_path / "terminal.json", messages, "tiny")
    choose_file(page, tmp_path / "terminal.json")
    expect(answers(page)).to_have_text(["Hello!"])
    assert read_conversation(export(page).path()) == messages


DAMAGED = {
    "{": "it is not JSON",
    "[]": "it has no messages",
    json.dumps({"messages": [{"role": "system", "content": 3}]}): "its instructions are not text",
    json.dumps({"messages": [HELLO, {"role": "tool", "content": ""}]}): "its message 2 is damaged",
    json.dumps({"messages": [HELLO, HELLO]}): "its questions and answers do not take turns",
    " " * ((8 << 20) + 1): "it has more than 8 MB",
}


def test_a_damaged_file_gets_a_sentence(page, tmp_path):
    sentences = page.evaluate(
        """async (texts) => {
            const { fromFile } = await import("/page/conversation.js");
            const files = texts.map((text) => new File([text], "notes.json"));
            return Promise.all(files.map((file) => fromFile(file).catch(({ message }) => message)));
        }""",
        [*DAMAGED],
    )
    for sentence, reason in zip(sentences, DAMAGED.values(), strict=True):
        assert sentence.startswith(f"“notes.json” holds no conversation ({reason}")
    choose_file(page, tmp_path / "notes.json", [])
    expect(page.locator("#note")).to_have_text(sentences[1])
    expect(page.locator("#chats li")).to_have_count(0)


def test_a_hostile_file_does_nothing(page, tmp_path):
    attack = "<img src=x onerror='window.hacked = 1'>"
    fields = ("content", "reasoning", "model", "decoding", "error", "onclick")
    answer = dict.fromkeys(fields, attack) | {"role": "assistant"}
    answer["stats"] = {"tokens": 1, "speed": None, "first": 1}
    messages = [{"role": "system", "content": attack}, HELLO | {"content": attack}, answer]
    path = tmp_path / f"{attack.replace('/', '')}.json"
    choose_file(page, path, {"title": attack, "messages": messages})
    expect(answers(page)).to_have_text(attack)
    expect(page.locator("#show-system")).to_have_text(attack)
    choose_file(page, path, {})
    expect(page.locator("#note")).to_contain_text("<img")
    assert page.evaluate("window.hacked") is None
    expect(page.locator("main img:not([alt=''])")).to_have_count(0)


def test_two_windows_lose_no_message(script, page):
    half = Event()
    script.answers = [["Uno."], ["Due."], ["Tre, ", half, "end."], ["Quattro."]]
    ask(page, "One?", ends=1)
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#open-history").tap()
    other.locator("#chats .open").tap()
    ask(other, "Two?", ends=2)
    # Chromium draws the others once a second.
    page.bring_to_front()
    expect(answers(page)).to_have_text(["Uno.", "Due."])
    ask(page, "Three?")
    expect(answers(page).last).to_have_text("Tre,")
    other.bring_to_front()
    # Both go on at the same time, each with its own text.
    ask(other, "Four?", ends=3)
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


def test_a_choice_of_models(script, open_page):
    script.info = INFO | {"models": [MODEL, OTHER, PLAIN]}
    page = open_page("ipad")
    choice = page.get_by_label("Model", exact=True)
    mode = page.locator("#mode")
    ask(page, "One?", ends=1)
    choice.select_option(OTHER["name"])
    page.reload()
    expect(page.locator("#model")).to_have_text(OTHER["name"])
    expect(mode).to_have_text("· unverified")
    ask(page, "Two?", ends=2)
    choice.select_option("plain")
    expect(mode).to_have_text("· dense")
    with settings(page):
        expect(page.locator("#dense")).to_be_disabled()
        expect(page.locator("#decoding")).to_contain_text("(its FlashHead is being built)")
    ask(page, "Three?", ends=3)
    figures = [MODEL["name"], "unverified", "plain"]
    expect(page.locator(".stats")).to_contain_text(figures)
    assert [body["model"] for body in script.requests] == [MODEL["name"], OTHER["name"], "plain"]
    assert "dense" not in script.requests[-1]

    # A server of one model shows no choice.
    script.info = INFO
    page.reload()
    expect(choice).to_be_hidden()
    ask(page, "Four?", ends=4)
    assert "model" not in script.requests[-1]


@pytest.mark.parametrize(
    "locale, time",
    [("en-US", r"\d\d:\d\d [AP]M"), ("de-DE", r"\d\d:\d\d"), ("en-GB", r"\d\d:\d\d")],
)
def test_times_and_titles(script, open_page, locale, time):
    """24 hours where the user's language has them, and "…" where a title is too long."""
    page = open_page("macbook", locale=locale)
    ask(page, "word " * 30, ends=1)
    expect(page.locator("#chats .when")).to_have_text(re.compile(rf"^{time}$"))
    title = page.locator("#chats .name").text_content()
    assert title == f"{'word ' * 15}word…"
    page.get_by_role("button", name="Rename “").click()
    # This changes nothing.
    page.keyboard.press("Enter")
    expect(page.locator("#chats .name")).to_have_text(title)
    record = page.evaluate(
        "Object.entries(localStorage).find(([key]) => key.includes('.chat.'))[1]"
    )
    assert "title" not in json.loads(record)


@pytest.mark.parametrize(
    "question, title",
    [
        ("## Why is the **sky** `blue`?", "Why is the sky blue?"),
        ("- one\n- [two](https://a.example/)\n> ~~three~~", "one two three"),
        ("```python\nreturn a**b * 2\n```", "return a**b * 2"),
        ("a * b * c, my_name, `", "a * b * c, my_name, `"),
    ],
)
def test_a_title_has_no_marks_of_markdown(page, question, title):
    ask(page, question, ends=1)
    expect(page.locator("#title")).to_have_text(title)
    expect(open_list(page)).to_have_text([title])


OVERFLOWING = """[...document.querySelectorAll("body *")].filter((node) => {
    const { left, right, width } = node.getBoundingClientRect();
    return width && node.checkVisibility() && !node.closest("#history, pre, .spoken")
        && (left < -1 || right > innerWidth + 1);
}).map((node) => node.outerHTML.slice(0, 80))"""


def test_nothing_is_cut_off_on_a_small_screen(script, open_page):
    name = "mlx-community/a-model-with-a-very-long-name-of-many-words-Instruct-4bit"
    script.info = INFO | {"models": [MODEL | {"name": name}]}
    script.answers = [[f"{'word ' * 50}\n\n```\n{'code ' * 60}\n```\n"]] * 3
    page = open_page("small")
    ask(page, "word " * 60, ends=1)
    becomes(page, OVERFLOWING, [])
    page.locator("#open-settings").click()
    becomes(page, "settings.scrollHeight <= settings.clientHeight")
    becomes(page, OVERFLOWING, [])
    page.screenshot(path=SCREENSHOTS / "small-4-settings.png")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#verdict")).to_contain_text("The texts are equal.")
    becomes(page, OVERFLOWING, [])
