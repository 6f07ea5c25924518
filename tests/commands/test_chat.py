"""``chat``: at a pseudo-terminal as a user has it, and over pipes."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

import mlx_flashhead
from mlx_flashhead.chatting.conversation import Conversation
from mlx_flashhead.cli.terminal import Terminal
from model_folders import VOCAB_SIZE, write_model

CHECKOUT = Path(__file__).parents[2]
N_CLUSTERS = -(-VOCAB_SIZE // 16)
ENVIRONMENT = {
    "PYTHONPATH": str(CHECKOUT),
    "HF_HUB_OFFLINE": "1",
    "TERM": "xterm",
    "PYTHONIOENCODING": "utf-8",
}
PROMPT = r"(?<=\n)> $|\x1b\[\?2004h> $"  # readline announces pasted text
FIGURES = r"\[(\d+) tokens, [\d.]+ tokens/s, [\d.]+% of the time in the head, prompt (\d+) tokens"
ANSWER_TOKENS = 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(converted, folder):
    """A function that starts the chat at a pseudo-terminal of its own."""
    running = []

    def start(*arguments, max_tokens=ANSWER_TOKENS):
        command = ["-m", "mlx_flashhead.chat", "--model", converted, "-m", max_tokens, *arguments]
        child = pexpect.spawn(
            sys.executable, [*map(str, command)], env={**os.environ, **ENVIRONMENT},
            encoding="utf-8", codec_errors="replace", timeout=60, dimensions=(40, 300),
        )  # fmt: skip
        child.delaybeforesend = 0
        running.append(child)
        child.expect(PROMPT)
        return child

    yield start
    for child in running:
        child.close(force=True)


def say(child, line):
    """Types a line; what is shown until the next prompt, without the line and without colours."""
    child.sendline(line)
    child.expect(PROMPT)
    shown = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", child.before).replace("\r", "")
    return shown.partition("\n")[2].strip("\n")


def interrupt(child, presses=10):
    """Ctrl-C until there is a prompt: input() misses one that comes just before it waits."""
    for _ in range(presses):
        child.sendintr()
        if child.expect([PROMPT, pexpect.TIMEOUT], timeout=6) == 0:
            return
    raise AssertionError(f"no prompt after {presses} times Ctrl-C")


def leave(child, how="/exit"):
    child.sendline(how)
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def printable(text):
    return "".join(c for c in text if c in "\n\t" or c.isprintable()).strip("\n")


@pytest.fixture
def expected(converted):
    """A conversation in this process, whose answers the program's must be."""
    return Conversation(*mlx_flashhead.load(str(converted)))


def test_a_conversation_at_the_terminal(start, expected, folder):
    child = start()
    assert "4 of 17 clusters" in child.before and "/help" in child.before
    for question in ("Hello there", "And then?"):
        text, _, figures = say(child, question).rpartition("\n")
        right = "".join(expected.ask(question, max_tokens=ANSWER_TOKENS))
        assert printable(text) == printable(right)
        found = re.search(FIGURES, figures)
        assert found, figures
        assert (int(found[1]), int(found[2])) == (ANSWER_TOKENS, expected.answers[-1].n_prompt)
    assert "Wrote 4 messages to chat.json" in say(child, "/save chat.json")
    assert json.loads((folder / "chat.json").read_text())["messages"] == expected.messages
    right = "".join(expected.ask("Go on", max_tokens=ANSWER_TOKENS))
    assert printable(right) in printable(say(child, "Go on"))
    leave(child)

    other = start()
    assert "4 messages from chat.json" in say(other, "/load chat.json")
    assert printable(right) in printable(say(other, "Go on"))
    leave(other, "q")


def test_every_command(start):
    child = start("--system-prompt", "Be brief.")
    listed = say(child, "/help")
    for command in ["/help", "/reset", "/stats", "/probes", "/dense", "/save", "/load", "/exit"]:
        assert f"  {command} " in listed
    first = say(child, "Hello")
    stats = say(child, "/stats")
    assert "4 of 17 clusters" in stats and "3 messages" in stats
    assert re.search(r"last answer: \d+ tokens, ", stats)
    assert re.search(r"\n1 answer of \d+ tokens, [\d.]+ tokens/s", stats)
    assert "1 of 17 clusters" in say(child, "/probes 1")
    assert "A new conversation" in say(child, "/reset")
    few = say(child, "Hello")
    assert few.splitlines()[0] != first.splitlines()[0]
    for wrong in ("0", "18", "-1", "many", "1.5"):
        said = say(child, f"/probes {wrong}")
        assert f"1 to {N_CLUSTERS}" in said and len(said.splitlines()) == 1
    assert "1 of 17 clusters" in say(child, "/probes")
    assert "Now dense" in say(child, "/dense")
    say(child, "r")
    dense = say(child, "Hello").splitlines()[0]
    assert "Now 1 of 17" in say(child, "/dense")
    say(child, f"/probes {N_CLUSTERS}")
    say(child, "/reset")
    assert say(child, "Hello").splitlines()[0] == dense != few.splitlines()[0]
    assert "no command /foo" in say(child, "/foo bar")
    assert "needs the name of a file" in say(child, "/save")
    assert "chat.json" in say(child, "/load absent/chat.json")
    assert "holds no conversation" in say(child, f"/load {__file__}")
    assert "tokens/s" in say(child, " /a message that begins with a slash")
    assert say(child, "") == ""
    assert "  /help " in say(child, "h")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(start, folder, expected):
    child = start(max_tokens=-1)
    child.sendline("Hello there")
    child.expect(r"\n.{20,}")  # some of the answer is there
    child.sendintr()
    child.expect(PROMPT)
    assert re.search(r"\[\d+ tokens, .*stopped\]", child.before)
    say(child, "/save chat.json")
    messages = json.loads((folder / "chat.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    endless = expected.ask("Hello there", max_tokens=len(messages[1]["content"]) * 4 + 99)
    assert "".join(endless).startswith(messages[1]["content"])
    # what is answered next agrees with the text: another process, without this cache, says the same
    expected.replace(messages)
    right = printable("".join(expected.ask("Go on", max_tokens=200)))
    child.sendline("Go on")
    child.expect_exact("Go on")
    seen = ""
    while len(printable(seen)) < 60:
        child.expect(r".+")
        seen += child.after
    child.sendintr()
    child.expect(PROMPT)
    shown = (seen + child.before).replace("\r", "")
    seen = printable(re.split(r"\n(?:\x1b\[\d+m)*\[\d+ tokens", shown)[0])  # without the figures
    assert seen
    assert right.startswith(seen[:60])
    leave(child)


def test_ctrl_c_at_the_prompt_clears_the_line(start):
    child = start()
    child.send("never mind")
    child.expect_exact("never mind")
    interrupt(child)
    assert "/exit or Ctrl-D leaves" in child.before
    assert "0 messages" in say(child, "/stats")
    leave(child)


def test_history_and_completion(start, folder):
    (folder / "my-talk.json").write_text("[]")
    child = start()
    say(child, "Hello there")
    assert "tokens/s" in say(child, "\x1b[A")  # up: the same question again
    assert "4 messages" in say(child, "/sta\t")
    assert "0 messages from my-talk.json" in say(child, "/lo\tmy-\t")
    leave(child)


def test_completions(folder, monkeypatch):
    (folder / "a folder").mkdir()
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deeper.json").touch()
    (folder / ".hidden").touch()
    terminal = Terminal(["/save", "/stats", "/exit"], ["/save"])

    def completions(line):
        from mlx_flashhead.cli import terminal as module

        monkeypatch.setattr(module.readline, "get_line_buffer", lambda: line)
        word = line.rpartition(" ")[2]
        found = [terminal.complete(word, i) for i in range(9)]
        return found[: found.index(None)]

    assert completions("/s") == ["/save ", "/stats "]
    assert completions("") == completions("hello") == completions("/exit ") == []
    assert completions("/save ") == ["a folder/", "sub/"]
    assert completions("/save sub/de") == ["sub/deep/", "sub/deeper.json"]
    assert completions("/save .h") == [".hidden"]
    assert completions("/save absent/x") == []


def piped(lines, *arguments):
    command = [sys.executable, "-m", "mlx_flashhead.chat", *map(str, arguments)]
    return subprocess.run(
        command, input=lines, capture_output=True, env={**os.environ, **ENVIRONMENT}
    )


def test_over_pipes(converted, folder, expected):
    lines = b"Hello there\n/probes 99\nAnd then?\n/save chat.json\n"
    result = piped(lines, "--model", converted, "-m", ANSWER_TOKENS)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"\x1b" not in result.stdout and b"> " not in result.stdout[:2]
    assert b"1 to 17" in result.stdout and result.stdout.count(b"tokens/s") == 2
    for question in ("Hello there", "And then?"):
        "".join(expected.ask(question, max_tokens=ANSWER_TOKENS))
    assert json.loads((folder / "chat.json").read_text())["messages"] == expected.messages


@pytest.fixture
def typed(run, monkeypatch):
    """A function that gives lines to the chat in this process: what it prints."""

    def typed(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code, output, errors = run("chat", *arguments, "-m", ANSWER_TOKENS)
        assert (code, errors) == (0, "")
        return output

    return typed


def test_dense_needs_no_flash_head(typed, dense, converted):
    output = typed("Hello\n/probes 3\n/dense\n", "--model", dense, "--dense")
    assert output.count("This model has no FlashHead") == 2
    answer = output.splitlines()[0]
    with_head = typed("Hello\n/dense\n/reset\nHello\n", "--model", converted, "--dense")
    assert with_head.splitlines()[0] == answer
    assert "Now 4 of 17" in with_head and with_head.count(answer) == 1


def test_sampling_follows_the_seed(typed, converted):
    arguments = ("--model", converted, "--temp", 1, "--seed")
    texts = [typed("Hello\n", *arguments, seed).splitlines()[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_probes_of_the_command_line(typed, converted):
    assert "1 of 17 clusters" in typed("/stats\n", "--model", converted, "--n-probes", 1)


def test_a_cache_without_a_limit_is_said(typed, converted):
    assert "no effect" in typed("Hello\n", "--model", converted, "--max-kv-size", 24)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "--model is needed"),
        (("--model", "./absent"), "There is no folder ./absent"),
        (("--model", "x", "-m", 0), "--max-tokens is 0"),
        (("--model", "x", "--temp", -1), "--temp is -1"),
        (("--model", "x", "--temp", "nan"), "--temp is nan"),
        (("--model", "x", "--top-p", 2), "--top-p is 2"),
        (("--model", "x", "--xtc-threshold", 0.7), "--xtc-threshold is 0.7"),
        (("--model", "x", "--seed", -1), "--seed is -1"),
        (("--model", "x", "--max-kv-size", 0), "--max-kv-size is 0"),
        (("--model", "x", "--prefill-step-size", 0), "--prefill-step-size is 0"),
        (("--model", "x", "--pipeline"), "one process"),
    ],
)
def test_chat_refuses_flags(refused, arguments, said):
    assert said in refused("chat", *arguments)


def test_chat_refuses_models_and_probes(refused, dense, converted, tmp_path):
    assert "without FlashHead" in refused("chat", "--model", dense)
    assert "has no FlashHead" in refused("chat", "--model", dense, "--dense", "--n-probes", 3)
    assert "1 to 17" in refused("chat", "--model", converted, "--n-probes", 18)
    bare = write_model(tmp_path / "bare", chat_template=None)
    assert "no chat template" in refused("chat", "--model", bare, "--dense")
