"""``chat``: at a pseudo-terminal as a user has it, and over pipes."""

import errno
import io
import json
import re
import signal
import sys
import termios
from unittest.mock import Mock

import pexpect
import pytest

import mlx_flashhead
from chain_models import write_chain_model
from chat_screen import CTRL_C, CTRL_D, CTRL_U, ESC_ENTER, UP, ChatScreen
from mlx_flashhead.chatting import session
from mlx_flashhead.chatting.conversation import Conversation
from mlx_flashhead.common.command import UNPRINTABLE
from mlx_flashhead.common.terminal import Terminal
from model_folders import VOCAB_SIZE

N_CLUSTERS = -(-VOCAB_SIZE // 16)
ANSWER_TOKENS = 12
FIGURES = rf"{ANSWER_TOKENS} tokens, [\d.]+ tokens/s, prompt (\d+) tokens"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the chats take place, which is also their user's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def start(converted, folder):
    """A function that starts the chat at a pseudo-terminal of its own."""
    running = []

    def start(*arguments, model=converted, max_tokens=ANSWER_TOKENS, **options):
        arguments = ("--model", model, "-m", max_tokens, *arguments)
        running.append(ChatScreen(*arguments, home=folder, **options))
        return running[-1]

    yield start
    for chat in running:
        chat.child.close(force=True)


@pytest.fixture
def typed(run, monkeypatch):
    """A function that gives lines to the chat in this process: the answers, and what it says."""

    def typed(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        code, output, errors = run("chat", *arguments, "-m", ANSWER_TOKENS)
        assert code == 0
        return output, errors

    return typed


def words(text):
    """What can be compared with a screen, which breaks lines and drops spaces at their ends."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable()).split()


def messages(file):
    return json.loads(file.read_text())["messages"]


def check_end(chat, number):
    """A signal ends the chat, and the terminal is as it was."""
    chat.child.kill(number)
    chat.child.expect(pexpect.EOF)
    assert chat.child.wait() == 128 + number
    flags = termios.tcgetattr(chat.child.child_fd)[3]
    assert flags & termios.ECHO and flags & termios.ICANON


def test_a_conversation_at_a_terminal(start, converted, folder):
    right = Conversation(*mlx_flashhead.load(str(converted)))
    chat = start()
    assert "4 of 17 clusters" in " ".join(words(chat.greeting)) and "/help" in chat.greeting
    for question in ("Hello there", "And then?"):
        text, _, said = chat.say(question).partition("\n[")
        assert words(text) == words("".join(right.ask(question, max_tokens=ANSWER_TOKENS)))
        figures = re.match(FIGURES, said)
        assert int(figures[1]) == right.answers[-1].n_prompt, said
        assert f"[cut at --max-tokens {ANSWER_TOKENS}:" in said
    assert "Wrote 4 messages to chat.json" in chat.say("/save chat.json")
    assert messages(folder / "chat.json") == right.messages
    chat.type(UP, "> /save chat.json")
    chat.type(UP, "> And then?")
    assert "/exit or Ctrl-D leaves" in chat.interrupt()
    chat.type(CTRL_D)
    chat.child.expect(pexpect.EOF)
    assert chat.child.wait() == 0
    stored = folder / ".config/mlx_flashhead/chat"
    assert messages(stored / "last.json") == right.messages
    assert stored.stat().st_mode & 0o077 == 0


def test_lines_are_edited_and_several_are_one_question(start, folder):
    (folder / "my-talk.json").write_text("[]")
    chat = start()
    # A terminal tells of a paste in this way.
    paste = "\x1b[200~/first\r\nsecond\n  third\x1b[201~"
    by_key = ("by key" + ESC_ENTER, "…"), ("and key", "… and key")
    in_quotes = ('"""/in\r', "…"), ("\r", "…"), ('quotes"""', '… quotes"""')
    for question in (((paste, "…   third"),), by_key, in_quotes):
        for keys, shown in question:
            chat.type(keys, shown)
        chat.say()
    chat.say("/save chat.json")
    questions = [m["content"] for m in messages(folder / "chat.json") if m["role"] == "user"]
    assert questions == ["/first\nsecond\n  third", "by key\nand key", "/in\n\nquotes"]
    chat.type("/lo\tmy-\t", "> /load my-talk.json")
    assert "0 messages from my-talk.json" in chat.say()
    chat.type("/sta\t", "> /stats")
    assert "0 messages" in chat.say()
    check_end(chat, signal.SIGHUP)


DAYS = [f"{day}-{week} " for week in range(4) for day in ("monday", "tuesday", "friday")]


def test_an_answer_on_a_narrow_screen_is_stopped(start, folder):
    """Words stay whole, and keys that are typed meanwhile stand at the next prompt."""
    days = write_chain_model(folder / "days", [" ", *DAYS], words=tuple(DAYS), endless=True)
    chat = start("--dense", model=days, max_tokens=-1, columns=30)
    for _ in range(2):
        chat.type("Which days?", "> Which days?")
        row = chat.screen.cursor.y + 1
        chat.type("\r")
        # Some of the answer is there.
        chat.wait(lambda row=row: chat.lines(row)[6])
        lines = [f"{line} " for line in chat.lines(row)[:4]]
        assert lines == ["".join(DAYS[i : i + 3]) for i in range(0, 12, 3)]
        chat.type("/st")
        chat.wait(lambda row=row: chat.lines(row)[10])
        first = chat.screen.cursor.y + 1
        # What was typed is not lost.
        chat.type(CTRL_C, "> /st")
        answer = "\n".join(chat.lines(first)[: chat.screen.cursor.y - first])
        chat.type(CTRL_U, ">")
        assert re.search(r"\[\d+ tokens,[^]]*\sstopped\]", answer)
        assert "/st" not in "".join(chat.lines(row)[:10]) + answer
    chat.say("/save chat.json")
    for message in messages(folder / "chat.json")[1::2]:
        assert ("".join(DAYS) * 9999).startswith(message["content"])
    check_end(chat, signal.SIGTERM)


def test_without_prompt_toolkit_lines_are_typed_all_the_same(monkeypatch, capsys, folder):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""Hello\nthere"""\n'))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    terminal = Terminal([], [], folder / "history")
    assert terminal.interactive and terminal.read() == '"""Hello\nthere"""'
    shown = capsys.readouterr().out
    assert "pip install 'mlx_flashhead[chat]'" in shown and shown.endswith("> > ")


NEEDED = f"/probes needs a number from 1 to {N_CLUSTERS}."


def test_every_command_over_pipes(typed, converted, folder):
    """Standard output has the answers and nothing else, which are those of verified tokens."""
    (folder / "notes.txt").write_text("no conversation")
    turns = (
        ("/help", "  /help    what can be typed"),
        ("Hello", "tokens/s"),
        ("/stats", "4 of 17 clusters"),
        ("", "backend 'mlx': MLX finds no Apple GPU on this machine."),
        ("", "speed with FlashHead on this machine: not known yet"),
        ("", "3 messages, "),
        ("", f"last answer: {ANSWER_TOKENS} tokens, "),
        ("/probes 1", "1 of 17 clusters"),
        ("/reset", "A new conversation"),
        ("Hello", "tokens/s"),
        *((f"/probes {n}", NEEDED) for n in (0, 18, -1, "many", 1.5)),
        ("/probes", "1 of 17 clusters"),
        ("/dense", "Now dense"),
        ("r", "A new conversation"),
        ("Hello", "tokens/s"),
        ("/dense", "Now verified, 1 of 17"),
        ("/save", "needs the name of a file"),
        ("/load notes.txt", "does not hold a conversation"),
        ("/save notes.txt", "does not hold a conversation"),
        ('"""/And\nthen?"""', "tokens/s"),
        (" /a message", "tokens/s"),
        ("/save chat.json", "Wrote 7 messages to chat.json"),
        ("/load chat.json", "Read 7 messages from chat.json"),
        ("/h", "  /exit    leave"),
        ("q", ""),
        ("/reset", ""),
    )
    lines = "".join(f"{line}\n" for line, _ in turns)
    answers, said = typed(lines, "--model", converted, "--system-prompt", "Be brief.")
    assert re.search(".*".join(re.escape(wanted) for _, wanted in turns), said, re.DOTALL)
    assert all(f"  {command} " in said for command in session.COMMANDS)
    # /stats has one more.
    assert said.count("tokens/s") == 6
    assert "\x1b" not in said and said.count("A new conversation") == 2
    right = Conversation(*mlx_flashhead.load(str(converted)), system_prompt="Be brief.")
    hello, *others = (
        "".join(right.ask(question, max_tokens=ANSWER_TOKENS)) + "\n"
        for question in ("Hello", "/And\nthen?", "/a message")
    )
    assert answers == "".join([*[hello] * 3, *others]).translate(UNPRINTABLE)
    assert messages(folder / "chat.json") == right.messages
    assert not (folder / ".config").exists()


def test_dense_needs_no_flash_head(typed, dense, converted):
    answer, said = typed("Hello\n/probes 3\n/dense\nexit\nx", "--model", dense, "--dense")
    assert said.count("This model has no FlashHead") == 2
    lines = "Hello\n/dense\n/reset\nHello\n quit \nx"
    answers, said = typed(lines, "--model", converted, "--dense")
    assert answers == 2 * answer
    assert "Now verified, 4 of 17" in said


def test_flags_of_the_command_line(typed, converted):
    flags = ("--model", converted, "--temp", 1, "--n-probes", 1, "--max-kv-size", 24, "--seed")
    texts = [typed("Hello\n/stats\n/quit now\nx", *flags, seed) for seed in (1, 1, 2)]
    assert texts[0][0] == texts[1][0] != texts[2][0]
    assert "1 of 17 clusters" in texts[0][1]


def test_a_conversation_goes_on_over_pipes(typed, refused, converted, folder, monkeypatch):
    """With --resume alone it is stored; where it cannot be stored, it goes on."""
    arguments = ("--model", converted)
    both, _ = typed("Hello\nGo on\n", *arguments)
    stored = folder / ".config/mlx_flashhead/chat/last.json"
    assert not stored.exists()
    arguments += ("--resume",)
    assert "There is no conversation to --resume" in refused("chat", *arguments)
    assert "leave --system-prompt out" in refused("chat", *arguments, "--system-prompt", "x")
    stored.parent.mkdir(parents=True)
    stored.write_text("{")
    assert re.search("not hold a conversation.*without --resume", refused("chat", *arguments))
    stored.write_text("[]")
    first, said = typed("Hello\n", *arguments)
    assert "0 messages" in said
    second, said = typed("Go on\n", *arguments)
    assert first + second == both and "2 messages" in said
    assert len(messages(stored)) == 4

    stored.write_text("[]")
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device", "last.json"))
    monkeypatch.setattr(session, "store_conversation", full)
    answers, said = typed("Hello\nGo on\n", *arguments)
    assert answers == both
    assert said.count("not kept for --resume: last.json: No space left") == 1
