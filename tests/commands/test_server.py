"""``server``: what it prints, how it ends, its flags, and mistakes before it serves."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest

import mlx_flashhead
from mlx_flashhead.decoding.guessing import guesses
from mlx_flashhead.index.files import write_companion
from mlx_flashhead.models.loading import load_dense
from mlx_flashhead.serving.access import Access, access_of
from mlx_flashhead.serving.server_options import check_options, make_parser
from server_process import serving
from tiny_models import tiny_index

PROMPT = "One day"
TOKENS = 8


def complete(server, **options):
    """The text of a completion."""
    options = {"max_tokens": TOKENS} | options
    answer = server.client().completions.create(model="model", prompt=PROMPT, **options)
    return answer.choices[0].text


@pytest.fixture(scope="module")
def expected(converted):
    """What the package generates densely."""
    return mlx_flashhead.generate(
        *mlx_flashhead.load(str(converted)), PROMPT, max_tokens=TOKENS, dense=True
    )


# A bias, so that no end token comes.
ENDLESS_ANSWER = {"max_tokens": 100_000, "stream": True, "logit_bias": {"50": 100}}


def test_it_says_where_it_is_and_logs_its_answers(converted, expected, tmp_path):
    """A line for each answer. Settings of sampling leave no thread behind."""
    with serving(tmp_path, "--model", converted) as server:
        assert server.line == f"Serving model (verified) at {server.url} (Ctrl-C ends it)\n"
        assert "FlashHead(" not in server.log()
        before = len(server.log().splitlines())
        stream = server.client().completions.create(model="model", prompt=PROMPT, **ENDLESS_ANSWER)
        next(iter(stream))
        stream.close()
        for path in ("/", "/page/app.js", "/health", "/v1/models"):
            urllib.request.urlopen(server.url + path).close()
        assert complete(server) == expected
        assert "the client has left" in server.lines(2, after=before)[0]
        for n, length in ((1, 1), (3, 1), (3, 2)):
            complete(server, max_tokens=length, n=n, temperature=1.0)
        answer = r"127\.0\.0\.1 POST /v1/completions 200, \S+ s, model, 7 \+ \d tokens"
        # Answers of one token have no speed.
        speeds = ("", "", r", \S+ tokens/s")
        lines = server.lines(5, after=before)[2:]
        for line, speed in zip(lines, speeds, strict=True):
            assert re.search(f"{answer}{speed}, verified$", line)
        threads = Path(f"/proc/{server.process.pid}/task")
        if threads.exists():
            counts = []
            for i in range(24):
                complete(server, max_tokens=2, temperature=0.5 + i / 100, top_p=0.9)
                counts.append(len([*threads.iterdir()]))
            assert max(counts[8:]) <= counts[7] + 2, counts
        assert server.end(signal.SIGINT) == (0, "Stopped.\n")


def what_ended(answer):
    """What is said of an answer's end: its error, or what it returned."""
    error = answer.exception()
    if error is None:
        return str(answer.result())
    return str(error)


@pytest.mark.parametrize("signals", [1, 2])
def test_it_ends_amid_answers_and_a_second_signal_aborts_nothing(converted, tmp_path, signals):
    """A client learns why its answer ends, also if its prompt is still being read."""
    flags = ("--context-size", 100_000, "--log-level", "WARNING")
    with serving(tmp_path, "--model", converted, *flags) as server, ThreadPoolExecutor() as pool:
        client = server.client()
        streams = [
            client.completions.create(model="model", prompt=prompt, **ENDLESS_ANSWER)
            for prompt in (PROMPT, "a" * 90_000)
        ]
        next(iter(streams[0]))
        whole = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        body = ENDLESS_ANSWER | {"prompt": PROMPT, "stream": False}
        whole.request("POST", "/v1/completions", json.dumps(body))
        # The server has the others by then.
        urllib.request.urlopen(server.url + "/health").close()
        answers = [pool.submit(list, stream) for stream in streams]
        answers.append(pool.submit(lambda: json.load(whole.getresponse())["error"]["message"]))
        for _ in range(signals - 1):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        code, rest = server.end()
        said = [what_ended(answer) for answer in answers]
        # There is no word of C++.
        assert server.log() == ""
        if code == 0:
            assert rest == "Stopped.\n"
            assert all("The server is shutting down" in each for each in said)
        else:
            # The second signal has ended it at once.
            assert (signals, code, rest) == (2, 128 + signal.SIGTERM, "")


def test_signals_while_it_ends_abort_nothing(converted, tmp_path):
    """uvicorn no longer handles them then, and the engine ends its thread."""
    with serving(tmp_path, "--model", converted) as server:
        stream = server.client().completions.create(model="model", prompt=PROMPT, **ENDLESS_ANSWER)
        next(iter(stream))
        for seconds in (0.2, 0.2, 0.5):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(seconds)
        code, _ = server.end()
        assert code in (0, 128 + signal.SIGTERM)
        assert not {"terminate", "Fatal"} & {*server.log().split()}


# The package's first lines, a library of models, and the last that is imported before it loads.
MODULES = ("mlx_flashhead.common.command", "transformers.utils", "mlx_flashhead.serving.endpoints")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", MODULES)
def test_a_signal_while_it_starts_ends_it(converted, module, number):
    words = ["-X", "importtime", "-m", "mlx_flashhead.server", "--port", "0"]
    command = [sys.executable, *words, "--model", str(converted)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        while not process.stderr.readline().endswith(f" {module}\n"):
            pass
        process.send_signal(number)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
        output = process.stdout.read()
    # It was quicker than this process.
    served = output.endswith("Stopped.\n")
    errors = "".join(rest)
    assert "Traceback" not in errors
    if served:
        assert process.returncode == 0
    else:
        assert process.returncode == 128 + number
        said = "\nInterrupted.\n" if number == signal.SIGINT else ""
        assert errors == said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "./nope"], "There is no folder ./nope: check the path of the model."),
        ([], "--model is needed: give a folder or a repository of a model, on this machine for"),
    ],
)
def test_a_mistake_is_one_sentence(words, said):
    """No library prints a word before it, as a user's shell starts the server."""
    environment = {name: value for name, value in os.environ.items() if "TRANSFORMERS" not in name}
    command = [sys.executable, "-m", "mlx_flashhead.server", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {said}") and ended.stderr.count("\n") == 1


def test_flags_of_mlx_lm_and_of_the_head_arrive(converted, expected, tmp_path):
    """With a draft that has a FlashHead of its own."""
    flags = ["--draft-model", converted, "--num-draft-tokens", 2, "--max-tokens", TOKENS]
    flags += ["--prompt-cache-size", 2, "--decode-concurrency", 4, "--n-probes", 1]
    flags += ["--prefill-step-size", 16, "--served-model-name", "mine"]
    flags += ["--chat-template", "{{ messages[0].content }}", "--chat-template-args", "{}"]
    with serving(tmp_path, "--model", converted, *flags) as server:
        assert server.line.startswith("Serving mine (verified)")
        client = server.client()
        answer = client.completions.create(model="mine", prompt=PROMPT)
        assert (answer.model, answer.usage.completion_tokens) == ("mine", TOKENS)
        messages = [{"role": "user", "content": PROMPT}]
        chat = client.chat.completions.create(model="model", messages=messages)
        assert chat.usage.prompt_tokens == len(PROMPT)
        texts = [answer.choices[0].text, chat.choices[0].message.content]
        texts += [complete(server, extra_body=body) for body in ({"dense": True}, {"n_probes": 4})]
        assert texts == [expected] * 4


def test_dense_and_unverified_answers_with_a_flash_head_of_its_own(
    dense, converted, expected, tmp_path
):
    (tmp_path / "head").mkdir()
    write_companion(tmp_path / "head", tiny_index(load_dense(dense)[0], n_probes=1))
    flags = ("--flash-head", tmp_path / "head", "--no-verify", "--log-level", "WARNING")
    with serving(tmp_path, "--model", dense, *flags) as server:
        assert server.line.startswith("Serving model (unverified)")
        assert complete(server) != expected
        assert complete(server, extra_body={"dense": True}) == expected
    with serving(tmp_path, "--model", converted, *flags[2:], "--dense") as server:
        assert server.line.startswith("Serving model (dense")
        assert complete(server) == expected
        assert complete(server, extra_body={"dense": False}) != expected
        assert (*server.end(), server.log()) == (0, "Stopped.\n", "")


def test_server_refuses_what_cannot_be_served(refused, converted, tmp_path, monkeypatch):
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused("server", "--model", converted, "--port", port)
    assert re.search(f"Port {port} of 127.0.0.1.*in use", said)
    with monkeypatch.context() as patch:
        patch.setattr(guesses, "has_wide_steps", lambda model, layers: False)
        said = refused("server", "--model", converted, "--port", 0, "--lookup", "on")
    assert "--lookup is 'on', but a step of several tokens does not leave" in said
    broken = shutil.copytree(converted, tmp_path / "broken")
    (broken / "flash_head.index").write_bytes(b"x")
    assert "damaged or incomplete" in refused("server", "--model", broken, "--port", 0)
    shutil.copy(converted / "flash_head.index", broken)
    (broken / "model.safetensors").write_bytes(b"none")
    assert "cannot load the model" in refused("server", "--model", broken, "--port", 0)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)


def test_any_network_needs_the_token(tmp_path):
    """And this machine alone, the default, makes none."""

    def rules(*flags):
        flags = ["--model", "model", "--token-file", str(tmp_path / "token"), *flags]
        args = make_parser().parse_args(flags)
        check_options(make_parser(), args)
        return args.host, access_of(args)

    assert rules() == ("127.0.0.1", Access()) and not (tmp_path / "token").exists()
    for flags, expected in (
        (["--lan"], "0.0.0.0"),
        (["--host", "0.0.0.0"], "0.0.0.0"),
        (["--host", "192.168.1.5"], "192.168.1.5"),
        (["--host", "::"], "::"),
    ):
        host, access = rules(*flags, "--max-body-bytes", "500K")
        assert (host, access.max_body_bytes) == (expected, 500 << 10)
        assert access.token and access.token == rules(*flags)[1].token
    names = ("--allowed-hosts", "Mac.fritz.box,other", "--allowed-origins", "https://a.example")
    access = rules(*names)[1]
    assert access.hosts == {"mac.fritz.box", "other"} and access.origins == {"https://a.example"}
