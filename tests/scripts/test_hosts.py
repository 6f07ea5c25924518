"""What `scripts/hosts.py` says of programs whose texts differ, or are not repeated."""

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHECKED = "Checked model: 30 tokens: 20 verified (67%); 10 dense: its sampler\n"
SAID = f"Text of model: verified.\n{CHECKED}"


@pytest.fixture
def hosts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("hosts")


def row_of(hosts, monkeypatch, tmp_path, runs):
    """The row of a program whose runs (under FlashHead or not) have these texts."""
    monkeypatch.setattr(hosts.Environment, "make", lambda self: None)
    monkeypatch.setattr(hosts.Environment, "version_of", lambda self, name: "0.1")
    answers = iter(runs)
    ours = {False: "", True: SAID}
    monkeypatch.setattr(
        hosts,
        "texts_of_server",
        lambda host, environment, place, under: (next(answers), ours[under]),
    )
    monkeypatch.setattr(hosts, "default_of", lambda host, environment, place: (23, 24))
    host = hosts.Host("a server", hosts.Package("a-server", "1"), ("serve", "PORT"))
    return hosts.compare(host, tmp_path, tmp_path)


def test_texts_that_differ_are_told_from_those_that_are_not_repeated(hosts, monkeypatch, tmp_path):
    plain = {"greedy": "a", "drawn": "b", "other": "c"}
    ours = plain | {"drawn": "x", "greedy": "y"}
    again = plain | {"drawn": "z"}
    row = row_of(hosts, monkeypatch, tmp_path, [plain, ours, again])
    assert (row["texts"], row["same"], row["not_repeated"]) == (2, 1, 1)
    assert (row["tokens"], row["verified"], row["said"]) == (30, 20, ["verified"])
    line = "| a server | a-server 1 | 0.1 | 1 of 2, 1 drawn anew | 20 of 30 | 23 of 24 | verified |"
    assert hosts.table([row]).splitlines()[-1] == line


def test_equal_texts_need_no_third_run(hosts, monkeypatch, tmp_path):
    row = row_of(hosts, monkeypatch, tmp_path, [{"greedy": "a"}, {"greedy": "a"}])
    assert (row["texts"], row["same"], row["not_repeated"]) == (1, 1, 0)


def test_a_stream_has_the_text_of_a_whole_answer(hosts):
    call = {"id": "new", "function": {"name": "weather", "arguments": "{}"}}
    message = {"role": "assistant", "content": "One day", "tool_calls": [call]}
    whole = io.BytesIO(json.dumps({"choices": [{"message": message}]}).encode())
    parts = [{"role": "assistant", "content": "One"}, {"content": " day"}, {"tool_calls": [call]}]
    chunks = [{"choices": [{"delta": part}]} for part in parts] + [{"choices": [], "usage": {}}]
    lines = [f"data: {json.dumps(chunk)}\n".encode() for chunk in chunks]
    assert hosts.read_stream([b": comment\n", *lines, b"data: [DONE]\n"]) == hosts.read_whole(whole)


def test_programs_draw_the_same_in_each_thread():
    code = (
        "import os, threading, mlx.core as mx\n"
        "found = [mx.random.uniform().item()]\n"
        "def draw():\n    found.append(mx.random.uniform().item())\n"
        "for _ in range(2):\n"
        "    thread = threading.Thread(target=draw); thread.start(); thread.join()\n"
        "print(len(set(found)), flush=True)\n"
        # MLX may abort at its end where threads that drew have ended.
        "os._exit(0)"
    )
    words = [sys.executable, "-c", code]
    start = os.environ | {"PYTHONPATH": str(SCRIPTS / "host_start")}
    ended = subprocess.run(words, env=start, capture_output=True, text=True, check=True)
    assert ended.stdout == "1\n"
