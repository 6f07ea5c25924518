"""Compares the texts of other programs with `mlx_flashhead.run` and without, with a tiny model.

    python scripts/hosts.py                # all programs
    python scripts/hosts.py llm vllm-mlx   # some of them
    python scripts/hosts.py --cache FOLDER

Each program is installed in an environment of its own, under the cache folder. A server is asked
with penalties, then for greedy texts by eight clients at once, and then for one text after the
other, as its clients do: with its own defaults, streamed, with a sampler's settings, with tools,
and for the second answer of a conversation. A command runs with its defaults and with settings.
Draws are the same in each run, since `scripts/host_start` seeds MLX in each thread. Results go to
docs/benchmarks/hosts.json and into the table of docs/integrations.md. Ends with 1 if a text
differs.

A last start under `run` counts the tokens of one request, or one command, without any settings.
Needs the extra ``vlm``.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from host_environment import CHECKOUT, Environment, Package

sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers")]

import mlx_vlm
from mlx_lm import load

from mlx_flashhead.index.files import write_companion
from model_folders import write_model
from tiny_models import tiny_index
from vlm_folders import write_vision_model

RESULTS = CHECKOUT / "docs" / "benchmarks" / "hosts.json"
PAGE = CHECKOUT / "docs" / "integrations.md"
MARKS = ("<!-- hosts: scripts/hosts.py -->\n", "<!-- end of hosts -->\n")
DEFAULT_CACHE = Path("~/.cache/mlx_flashhead-hosts").expanduser()
UNDER = ("-m", "mlx_flashhead.run", "--check", "--flash-head-always", "--flash-head")
CHECKED = re.compile(r"^Checked .*?: ([\d,]+) tokens: ([\d,]+) verified.*$", re.MULTILINE)
TIMES = re.compile(r"^.*(tokens-per-sec|[Tt]okens per| tok/s |Peak memory).*$", re.MULTILINE)
START = Path(__file__).parent / "host_start"
CHECK_LINE = re.compile(r"^Checked .*$", re.MULTILINE)
REFUSAL = re.compile(r"\d{3}: ")
# A server that takes one client at a time answers with it.
BUSY = 503
N_CLIENTS = 8
N_TOKENS = 24
# A server has so long to answer.
SECONDS = 240
# Packages of pictures, sound and pages.
HEAVY = ("torch", "torchvision", "mflux", "gradio", "opencv-python", "mlx-whisper", "librosa", "av")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
GREEDY = {"temperature": 0}
# Sent before all others: once a text without processors was in a batch of mlx-lm 0.31.3, its later
# texts get no penalties, or those of another text, since its lists keep the entry.
PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.1, "temperature": 0},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3},
}
# What clients add to a request. To one without settings the program adds its defaults.
REQUESTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "again": {},
    "streamed": {"stream": True},
    "sampler": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.05},
    "tools": {"tools": [WEATHER]},
    "tools, greedy": {"tools": [WEATHER], "temperature": 0, "stream": True},
}


@dataclass(frozen=True)
class Host:
    """A program that is compared.

    Attributes:
        name: On the page, and on the command line.
        package: What is installed.
        words: Its command: a program of its environment, and arguments. PORT is a free port.
        typed: What a user types, for a program that does not serve.
        further: Further words of each run of a command.
        variables: Of its environment.
        model: Its model's name in requests.
        head: The folder of its FlashHead.
        not_run: Why it cannot be run on this kind of machine.
    """

    name: str
    package: Package
    words: tuple[str, ...]
    typed: str | None = None
    further: tuple[tuple[str, ...], ...] = ((),)
    variables: dict[str, str] = field(default_factory=dict)
    model: str = "model"
    head: str = "head"
    not_run: str = ""

    @property
    def serves(self) -> bool:
        """Whether it is a server."""
        return "PORT" in self.words


MLX_LM = Package("mlx-lm", "0.32.2")
MLX_VLM = Package("mlx-vlm", "0.7.10")
# It names these on a Mac alone.
MTPLX_NEEDS = ("mlx==0.32.2", "mlx-lm==0.31.3", "transformers>=5.10,!=5.13.0,<5.17", "nanobind")
MTPLX = Package("mtplx", "2.12.2", beside=MTPLX_NEEDS)
MTPLX_WORDS = ("mtplx", "serve", "--model", "model", "--port", "PORT", "--yes")
VLLM = Package("vllm-mlx", "0.6.0", without=HEAVY)
VLLM_WORDS = ("vllm-mlx", "serve", "model", "--port", "PORT")
OPENAI = Package("mlx-openai-server", "1.8.1", without=HEAVY)
OPENAI_WORDS = (
    "mlx-openai-server", "launch", "--model-path", "model", "--model-type", "lm", "--port", "PORT",
)  # fmt: skip
GENERATE = ("--model", "model", "--prompt", "One day", "--max-tokens", str(N_TOKENS))
SAMPLED = ("--temp", "0.8", "--top-p", "0.9")
HOSTS = [
    Host("mlx_lm.server", MLX_LM, ("mlx_lm.server", "--model", "model", "--port", "PORT")),
    Host(
        "mlx_lm.chat",
        MLX_LM,
        ("mlx_lm.chat", "--model", "model"),
        typed="One day\nTwo\nr\nOne day\nq\n",
        further=((), SAMPLED),
    ),
    Host(
        "mlx_lm.generate",
        MLX_LM,
        ("mlx_lm.generate", *GENERATE),
        typed="",
        further=((), SAMPLED, ("--temp", "1", "--min-p", "0.1", "--top-k", "40")),
    ),
    Host(
        "mlx_vlm.generate",
        MLX_VLM,
        ("mlx_vlm.generate", *GENERATE[2:], "--model", "vision"),
        typed="",
        further=((), ("--temperature", "0.8")),
        head="vision_head",
    ),
    Host(
        "mlx_vlm.server",
        MLX_VLM,
        ("mlx_vlm.server", "--model", "vision", "--port", "PORT"),
        model="vision",
        head="vision_head",
    ),
    Host("vllm-mlx", VLLM, VLLM_WORDS),
    Host("vllm-mlx, batches", VLLM, (*VLLM_WORDS, "--continuous-batching")),
    Host("mlx-openai-server", OPENAI, OPENAI_WORDS),
    Host(
        "oMLX",
        Package("flyto-mlx", "0.7.0", without=HEAVY),
        ("omlx", "serve", "--model-dir", "models", "--base-path", "omlx", "--port", "PORT"),
    ),
    Host(
        "llm",
        Package("llm", "0.36", beside=("llm-mlx==0.4",)),
        ("llm", "-m", "tiny", "One day", "-o", "max_tokens", str(N_TOKENS)),
        typed="",
        further=((), ("-o", "temperature", "0"), ("-o", "seed", "8", "-o", "top_p", "1")),
        variables={"LLM_USER_PATH": "llm"},
    ),
    Host("MTPLX", MTPLX, (*MTPLX_WORDS, "--scheduler-mode", "ar_batch")),
    Host(
        "rapid-mlx",
        Package("rapid-mlx", "0.16.10"),
        ("rapid-mlx", "serve"),
        not_run="it changes mlx-lm's batches from within, and stays dense by rule",
    ),
]


def make_place(place: Path) -> None:
    """Writes tiny models, their FlashHeads apart, and what the programs keep beside them."""
    model = write_model(place / "model", further={"max_position_embeddings": 4096})
    (place / "head").mkdir()
    write_companion(place / "head", tiny_index(load(str(model))[0]))
    vision, _ = mlx_vlm.load(str(write_vision_model(place / "vision")))
    (place / "vision_head").mkdir()
    write_companion(place / "vision_head", tiny_index(vision))
    (place / "models").mkdir()
    (place / "models" / "model").symlink_to(model, target_is_directory=True)
    (place / "llm").mkdir()
    names = {str(place / "model"): {"aliases": ["tiny"]}}
    (place / "llm" / "llm-mlx.json").write_text(json.dumps(names))


Texts = tuple[dict[str, str], str]


def command_of(host: Host, environment: Environment, under: bool) -> list[str]:
    """The words that start a program, under ``run`` or as it is."""
    program = environment.folder / "bin" / host.words[0]
    words = [str(program), *host.words[1:]]
    if under:
        return [str(environment.python), *UNDER, host.head, *words]
    return words


def variables_of(host: Host, environment: Environment, place: Path) -> dict[str, str]:
    """The environment of a program, in which nothing is downloaded."""
    own = {name: str(place / value) for name, value in host.variables.items()}
    path = f"{environment.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = {"PATH": path, "PYTHONPATH": str(START), "HF_HUB_OFFLINE": "1", "HOME": str(place)}
    return kept | start | own


@contextlib.contextmanager
def running(words: list[str], variables: dict[str, str], place: Path) -> Iterator[dict[str, Any]]:
    """A server until Ctrl-C: its ``port``, and after the block what it has ``said``."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = list(words)
    if "PORT" in words:
        words[words.index("PORT")] = str(port)
    server: dict[str, Any] = {"port": port, "said": ""}
    with tempfile.TemporaryFile("w+") as output:
        started = subprocess.Popen(
            words,
            cwd=place,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(started, port)
            yield server
        finally:
            started.send_signal(signal.SIGINT)
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
            output.seek(0)
            server["said"] = output.read()
            if "failed" in server:
                print(server["said"][-3000:], file=sys.stderr)


def wait_for(process: subprocess.Popen[str], port: int) -> None:
    """Waits until a server answers. TimeoutError if it does not, RuntimeError if it ends."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with {process.returncode}.")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=20).close()
            return
        time.sleep(1)
    raise TimeoutError(f"The server did not answer within {SECONDS} seconds.")


def ask(port: int, model: str, messages: list[dict[str, str]], settings: dict[str, Any]) -> str:
    """The text that a server answers, or what it says against the request."""
    body = {"model": model, "max_tokens": N_TOKENS, "messages": messages, **settings}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    end = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                if settings.get("stream"):
                    return read_stream(answer)
                return read_whole(answer)
        except urllib.error.HTTPError as error:
            if error.code != BUSY or time.monotonic() > end:
                return f"{error.code}: {error.read().decode()[:300]}"
        time.sleep(0.5)


def read_whole(answer: Any) -> str:
    """The text of an answer, and its calls."""
    message = json.load(answer)["choices"][0]["message"]
    return json.dumps([message.get("content") or "", calls_of(message)])


def read_stream(answer: Any) -> str:
    """The text of a stream, and its calls."""
    text = ""
    calls = []
    for line in answer:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                text += choice["delta"].get("content") or ""
                calls += calls_of(choice["delta"])
    return json.dumps([text, calls])


def calls_of(message: dict[str, Any]) -> list[Any]:
    """The functions of a message's calls: their ids are new in each answer."""
    return [call.get("function") for call in message.get("tool_calls") or []]


def texts_of_server(host: Host, environment: Environment, place: Path, under: bool) -> Texts:
    """Texts of a server by what was asked, and what it said."""
    words = command_of(host, environment, under)
    question = {"role": "user", "content": "One day"}
    with running(words, variables_of(host, environment, place), place) as server:

        def asking(messages: list[dict[str, str]], settings: dict[str, Any]) -> str:
            return ask(server["port"], host.model, messages, settings)

        texts = {name: asking([question], settings) for name, settings in PENALTIES.items()}
        with ThreadPoolExecutor(N_CLIENTS) as clients:
            contents = [f"{i} One day" for i in range(N_CLIENTS)]
            asked = [[{"role": "user", "content": content}] for content in contents]
            greedy = list(clients.map(lambda messages: asking(messages, GREEDY), asked))
        texts |= {f"client {i}": text for i, text in enumerate(greedy)}
        texts |= {name: asking([question], settings) for name, settings in REQUESTS.items()}
        second = [question, {"role": "assistant", "content": "it rained."}, question]
        texts["second answer"] = asking(second, {})
        texts["second answer, greedy"] = asking(second, GREEDY)
    return texts, server["said"]


def default_of(host: Host, environment: Environment, place: Path) -> tuple[int, int]:
    """Tokens of a request or a command without settings, under ``run``: verified, and all."""
    if host.serves:
        words = command_of(host, environment, under=True)
        with running(words, variables_of(host, environment, place), place) as server:
            ask(server["port"], host.model, [{"role": "user", "content": "One day"}], {})
        return counts_of(server["said"])
    plain = replace(host, further=((),))
    _, said = texts_of_command(plain, environment, place, under=True)
    return counts_of(said)


def counts_of(said: str) -> tuple[int, int]:
    """The tokens that a program says it has checked: verified, and all."""
    counts = [[int(n.replace(",", "")) for n in found] for found in CHECKED.findall(said)]
    return sum(verified for _, verified in counts), sum(n for n, _ in counts)


def texts_of_command(host: Host, environment: Environment, place: Path, under: bool) -> Texts:
    """Texts of a command by its further words, and what it said."""
    texts = {}
    said = ""
    for further in host.further:
        ended = subprocess.run(
            [*command_of(host, environment, under), *further],
            cwd=place,
            env=variables_of(host, environment, place),
            input=host.typed,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if ended.returncode:
            raise RuntimeError(f"It ended with {ended.returncode}: {ended.stderr[-600:]}")
        texts[" ".join(further) or "as it is"] = TIMES.sub("", ended.stdout)
        said += ended.stderr
    return texts, said


def compare(host: Host, cache: Path, place: Path) -> dict[str, Any]:
    """Runs a program twice, and returns its row of the table."""
    row: dict[str, Any] = {"program": host.name, "version": host.package.version}
    row["package"] = host.package.name
    if host.not_run:
        return row | {"result": f"not run: {host.not_run}"}
    environment = Environment(cache, host.package)
    try:
        environment.make()
        row["mlx_lm"] = environment.version_of("mlx-lm")
        texts = texts_of_command
        if host.serves:
            texts = texts_of_server
        plain, _ = texts(host, environment, place, False)
        ours, output = texts(host, environment, place, True)
        differing = [name for name, text in plain.items() if ours[name] != text]
        again = plain
        if differing:
            again = texts(host, environment, place, False)[0]
        default = default_of(host, environment, place)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return row | {"result": f"not run here: {str(error).splitlines()[-1][:200]}"}
    # What the program by itself does not repeat, in spite of the seed, cannot be compared.
    repeated = [name for name, text in plain.items() if again[name] == text]
    for name in differing:
        words = "is not repeated"
        if name in repeated:
            words = "differs"
        print(f"{host.name}, {name}: {words}", file=sys.stderr)
        print(f"  {plain[name][-300:]!r}\n  {ours[name][-300:]!r}", file=sys.stderr)
    verified, n_tokens = counts_of(output)
    said = sorted(set(re.findall(r"^Text of .*?: (.*)\.$", output, re.MULTILINE)))
    return row | {
        "texts": len(repeated),
        "same": sum(ours[name] == plain[name] for name in repeated),
        "not_repeated": len(plain) - len(repeated),
        "refused": [name for name, text in plain.items() if REFUSAL.match(text)],
        "tokens": n_tokens,
        "verified": verified,
        "default": list(default),
        "said": said,
        "checked": sorted(set(CHECK_LINE.findall(output))),
        "result": "compared",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    titles = ("program", "version", "mlx-lm", "same texts", "tokens verified")
    titles += ("of its default request", "what it says")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        version = f"{row['package']} {row['version']}"
        if row["result"] != "compared":
            lines.append(f"| {row['program']} | {version} | | | | | {row['result']} |")
            continue
        same = f"{row['same']} of {row['texts']}"
        if row["not_repeated"]:
            same += f", {row['not_repeated']} drawn anew"
        share = f"{row['verified']:,} of {row['tokens']:,}"
        default = ""
        if "default" in row:
            default = "{:,} of {:,}".format(*row["default"])
        said = "; ".join(row["said"])
        lines.append(
            f"| {row['program']} | {version} | {row['mlx_lm']} | {same} | {share} | {default} "
            f"| {said} |"
        )
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the results, and puts their table into the page."""
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}{table(rows)}{MARKS[1]}{after}")


def main() -> None:
    """Compares the programs that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("hosts", nargs="*", metavar="HOST", choices=[[], *(h.name for h in HOSTS)])
    args = parser.parse_args()
    known = []
    if RESULTS.exists():
        known = json.loads(RESULTS.read_text())
    rows = {row["program"]: row for row in known}
    for host in HOSTS:
        if args.hosts and host.name not in args.hosts:
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            make_place(place)
            rows[host.name] = compare(host, args.cache.expanduser(), place)
        print(table([rows[host.name]]).splitlines()[-1], flush=True)
        write([rows[h.name] for h in HOSTS if h.name in rows])
    if any(row.get("same") != row.get("texts") for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
