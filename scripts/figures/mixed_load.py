"""One server under a mixed load, each answer compared with the one it has alone: docs/server.md.

    python scripts/figures/mixed_models.py mixed
    python scripts/figures/mixed_load.py mixed/* --kv-bits 8 --json docs/benchmarks/mixed.json

Clients send what a server has to keep apart: streams and whole answers, several texts at once,
samplers with seeds, penalties, grammars, tools, prompts of different lengths. Some hang up. The
models are those of one server; with --kv-bits a second server has the first of them, and quantized
caches.
"""

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from threading import Event, Lock
from typing import Any, NamedTuple

from rich.table import Table

from measured_server import HOST, ServerProcess, serving
from mlx_flashhead.benchmark import add_number
from mlx_flashhead.benchmarks.reporting import machine
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table, show
from server_load import ANSWER_SECONDS, SENTENCE, TOPICS

# In seconds.
MINUTE = 60.0
SHARE_THAT_LEAVES = 0.2
# So many problems, or answers that differ, are shown.
MOST_SHOWN = 5
CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"

_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
_TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": _WEATHER}}]
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "weather", "schema": _WEATHER},
}
# What each kind of chat adds to its question. Draws have seeds, so they can be repeated.
CHATS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-p": {"temperature": 0.9, "top_p": 0.9, "seed": 7},
    "top-k, min-p": {"temperature": 1.1, "top_k": 40, "min_p": 0.02, "seed": 8},
    "XTC": {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05, "seed": 9},
    "n": {"n": 3, "temperature": 1.0, "seed": 10},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "penalties, drawn": {"repetition_penalty": 1.2, "temperature": 0.8, "seed": 11},
    "logit bias": {"logit_bias": {"5": 3, "6": -100, "7": 1.5}},
    "logprobs": {"logprobs": True, "top_logprobs": 4},
    "stop texts": {"stop": ["the", ". "]},
    "schema": {"response_format": _SCHEMA},
    "schema, drawn": {"response_format": _SCHEMA, "temperature": 1.0, "seed": 12},
    "regex": {"regex": "[A-Z][a-z ,]{8,60}[.]"},
    "tools": {"tools": _TOOLS},
    "tools, drawn": {"tools": _TOOLS, "temperature": 1.0, "seed": 13},
    "tools, required": {"tools": _TOOLS, "tool_choice": "required"},
    "dense": {"dense": True},
    "n_probes": {"n_probes": 16},
}
# So many sentences stand before the question.
LENGTHS = (0, 3, 24)


class Question(NamedTuple):
    """A request that is repeated, streamed or not.

    Attributes:
        body: JSON of all fields but those that ask for a stream.
    """

    model: str
    kind: str
    path: str
    body: str


class Text(NamedTuple):
    """One of the texts of an answer, without what is new in each answer, such as ids.

    Attributes:
        calls: Names and arguments.
    """

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    finish_reason: str | None


class Answer(NamedTuple):
    """What a client has received."""

    texts: tuple[Text, ...]
    n_tokens: int


class MixedLoad:
    """A load of one server.

    Args:
        server: What is asked.
        name: Of the server, for the report.
        n_clients: Clients at once.
        n_tokens: Of an answer, at most.
    """

    def __init__(self, server: ServerProcess, name: str, n_clients: int, n_tokens: int):
        self._server = server
        self._name = name
        self._n_clients = n_clients
        self._n_tokens = n_tokens
        self._alone: dict[Question, Answer] = {}
        # The reasons by model and kind.
        self._left_out: dict[str, str] = {}
        # It guards all fields below.
        self._lock = Lock()
        # The numbers of answers by kind.
        self._n_answered: Counter[str] = Counter()
        self._n_as_alone: Counter[str] = Counter()
        self._n_hung_up = 0
        self._problems: list[str] = []
        self._differences: list[dict[str, Any]] = []

    def ask_alone(self) -> None:
        """Asks each question while nobody else asks. Kinds that a model refuses are left out."""
        for model in served_models(self._server.port):
            questions = questions_of(model, self._n_tokens)
            print(f"{model} answers {len(questions)} questions alone.", file=sys.stderr)
            for question in questions:
                try:
                    self._alone[question] = ask(self._server.port, question, stream=False)
                except RefusedError as refusal:
                    self._left_out[f"{model}, {question.kind}"] = str(refusal)
                except (OSError, ValueError) as error:
                    self._note_problem(question, error)
        if not self._alone:
            reasons = [*self._problems, *self._left_out.values()]
            raise ValueError(f"No question was answered: {reasons[0]}")

    def ask_together(self, seconds: float) -> None:
        """Has all clients ask for a time. Answers that have begun then are completed."""
        ended = Event()
        with ThreadPoolExecutor(self._n_clients) as pool:
            clients = [
                pool.submit(self._ask_until, ended, Random(number))
                for number in range(self._n_clients)
            ]
            try:
                ended.wait(seconds)
            finally:
                # This ends the clients at Ctrl-C, too.
                ended.set()
        for client in clients:
            # This raises the client's error.
            client.result()

    def _ask_until(self, ended: Event, random: Random) -> None:
        """A client: asks one question after the other."""
        several = list(self._alone)
        while not ended.is_set():
            question = random.choice(several)
            stream = random.random() < 0.6
            patience = None
            if random.random() < SHARE_THAT_LEAVES:
                patience = random.uniform(0, 1)
            try:
                answer = ask(self._server.port, question, stream=stream, patience=patience)
                self._count(question, answer)
            except HungUpError:
                with self._lock:
                    self._n_hung_up += 1
            except (OSError, ValueError) as error:
                self._note_problem(question, error)

    def _note_problem(self, question: Question, error: Exception) -> None:
        with self._lock:
            self._problems.append(f"{question.model}, {question.kind}: {error}"[:300])

    def _count(self, question: Question, answer: Answer) -> None:
        expected = self._alone[question]
        with self._lock:
            self._n_answered[question.kind] += 1
            if answer == expected:
                self._n_as_alone[question.kind] += 1
                return
            difference = {
                "model": question.model,
                "kind": question.kind,
                "alone": [text.content for text in expected.texts],
                "beside_others": [text.content for text in answer.texts],
            }
            self._differences.append(difference)

    def figures(self) -> dict[str, Any]:
        """The figures so far, JSON-ready."""
        return {
            "server": self._name,
            "models": sorted({question.model for question in self._alone}),
            "clients": self._n_clients,
            "tokens": self._n_tokens,
            "questions": len(self._alone),
            "answered": self._n_answered.total(),
            "as_alone": self._n_as_alone.total(),
            "hung_up": self._n_hung_up,
            "lost": len(self._problems),
            "kinds": {
                kind: {"answered": number, "as_alone": self._n_as_alone[kind]}
                for kind, number in sorted(self._n_answered.items())
            },
            "tracebacks": sum(line.startswith("Traceback") for line in self._server.log()),
            "left_out": self._left_out,
            "problems": self._problems[:MOST_SHOWN],
            "differences": self._differences[:MOST_SHOWN],
        }


def make_table(result: dict[str, Any]) -> Table:
    """The table of one load, by kinds of requests."""
    title = "{server}: {clients} clients, {answered:,} answers of {questions} questions"
    caption = (
        "as alone: complete answers with the texts that the question has alone.\n"
        "Of {answered:,} answers {as_alone:,} are as alone. {hung_up:,} clients hung up, {lost:,} "
        "answers were lost, and the log has {tracebacks} tracebacks."
    )
    lines = [
        caption.format(**result),
        *(f"Left out: {kind}: {why}" for kind, why in result["left_out"].items()),
        *result["problems"],
        *(f"Differs: {each['model']}, {each['kind']}" for each in result["differences"]),
    ]
    table = new_table(title.format(**result), ("kind", "answered", "as alone"), "\n".join(lines))
    for kind, counts in result["kinds"].items():
        table.add_row(kind, str(counts["answered"]), str(counts["as_alone"]))
    return table


def questions_of(model: str, n_tokens: int) -> list[Question]:
    """All questions to a model: each kind with each length."""
    common = {"model": model, "max_tokens": n_tokens, "temperature": 0}
    found = []
    for number, (kind, fields) in enumerate(CHATS.items()):
        for length in LENGTHS:
            topic = TOPICS[number % len(TOPICS)]
            content = f"{SENTENCE * length}Write a sentence about {topic}."
            messages = [{"role": "user", "content": content}]
            body = json.dumps({**common, "messages": messages, **fields})
            found.append(Question(model, kind, CHAT_PATH, body))
    prompts = [f"{SENTENCE * length}{TOPICS[length % 8].capitalize()} and" for length in LENGTHS]
    for kind, fields in (
        ("texts", {"prompt": prompts}),
        ("texts, drawn", {"prompt": prompts[:2], "n": 2, "temperature": 0.9, "seed": 14}),
    ):
        found.append(Question(model, kind, TEXT_PATH, json.dumps({**common, **fields})))
    return found


class RefusedError(ValueError):
    """The server has refused a request: its message."""


class HungUpError(Exception):
    """The client has left, as it was to."""


def served_models(port: int) -> list[str]:
    """The names of the models of a server."""
    return [model["id"] for model in json.loads(get(port, "/v1/models"))["data"]]


def get(port: int, path: str) -> str:
    """What a server answers at a path; ValueError if it is an error."""
    try:
        with closing(HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)) as client:
            client.request("GET", path)
            response = client.getresponse()
            text = response.read().decode(errors="replace")
    except HTTPException as error:
        raise ValueError(f"the answer broke off: {error!r}") from error
    if response.status != 200:
        raise ValueError(f"{response.status}: {text}")
    return text


def ask(port: int, question: Question, *, stream: bool, patience: float | None = None) -> Answer:
    """A server's answer.

    Args:
        port: The server's port.
        question: What is sent.
        stream: Ask for a stream.
        patience: Seconds after which the client hangs up, wherever the answer is by then.

    Raises:
        HungUpError: If the client has left.
        RefusedError: If the request is refused.
        ValueError: If the answer has an error, or is not complete.
        OSError: If the server does not answer.
    """
    fields = json.loads(question.body)
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        status, lines = _sent(port, question.path, fields, patience)
    except HTTPException as error:
        raise ValueError(f"the answer broke off: {error!r}") from error
    except TimeoutError:
        if patience is None:
            raise
        raise HungUpError from None
    content = b"".join(lines)
    if status == 400:
        raise RefusedError(json.loads(content)["error"]["message"])
    if status != 200:
        raise ValueError(f"{status}: {content.decode(errors='replace')}")
    if stream:
        return read_stream(lines)
    return read_whole(json.loads(content))


def _sent(
    port: int, path: str, fields: dict[str, Any], patience: float | None
) -> tuple[int, list[bytes]]:
    """Sends a request. Returns the response's status and lines."""
    timeout = ANSWER_SECONDS
    if patience is not None:
        timeout = max(0.01, patience)
    leaves_at = time.monotonic() + timeout
    lines = []
    with closing(HTTPConnection(HOST, port, timeout=timeout)) as client:
        headers = {"Content-Type": "application/json"}
        client.request("POST", path, json.dumps(fields), headers)
        response = client.getresponse()
        for line in response:
            lines.append(line)
            if patience is not None and time.monotonic() >= leaves_at:
                raise HungUpError
    return response.status, lines


def read_whole(answer: dict[str, Any]) -> Answer:
    """An answer that came as one JSON object."""
    texts = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        message = choice.get("message", {"content": choice.get("text")})
        texts.append(
            Text(
                message["content"] or "",
                message.get("reasoning") or "",
                _calls(message.get("tool_calls") or []),
                choice["finish_reason"],
            )
        )
    return Answer(tuple(texts), answer["usage"]["completion_tokens"])


def read_stream(lines: list[bytes]) -> Answer:
    """An answer that came in server-sent events; ValueError if it has an error or no end."""
    texts: dict[int, Text] = {}
    n_tokens: int | None = None
    for line in lines:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise ValueError(chunk["error"]["message"])
        if chunk.get("usage"):
            n_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            delta = choice.get("delta", {"content": choice.get("text")})
            before = texts.get(choice["index"], Text("", "", (), None))
            texts[choice["index"]] = Text(
                before.content + (delta.get("content") or ""),
                before.reasoning + (delta.get("reasoning") or ""),
                before.calls + _calls(delta.get("tool_calls") or []),
                choice["finish_reason"] or before.finish_reason,
            )
    if n_tokens is None:
        raise ValueError("the stream ended without its usage")
    return Answer(tuple(text for _, text in sorted(texts.items())), n_tokens)


def _calls(calls: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """The names and arguments of tool calls."""
    functions = (call["function"] for call in calls)
    return tuple((function["name"], function["arguments"]) for function in functions)


def servers(models: list[str], kv_bits: int | None) -> dict[str, list[str]]:
    """The flags of the servers that are put under load, by name."""
    first, *further = models
    flags = ["--model", first, "--build-first", "--flash-head-always"]
    several = []
    if further:
        several = ["--allow-models", *further]
    found = {"all models": [*flags, *several]}
    if kv_bits is not None:
        quantized = ["--kv-bits", str(kv_bits), "--quantized-kv-start", "0"]
        found[f"--kv-bits {kv_bits}"] = [*flags, *quantized]
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of each server."""
    results = []
    for name, flags in servers(args.models, args.kv_bits).items():
        print(f"A server starts: {name}.", file=sys.stderr)
        with serving("mlx_flashhead.server", *flags) as server:
            load = MixedLoad(server, name, args.clients, args.tokens)
            load.ask_alone()
            load.ask_together(args.minutes * MINUTE)
            results.append(load.figures() | {"minutes": args.minutes})
    return results


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/mixed_load.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="folders of models")
    parser.add_argument("--json", type=writable, metavar="FILE", required=True, help="the figures")
    parser.add_argument("--kv-bits", type=int, help="of the caches of a second server")
    add_number(parser, "--clients", 16, "Clients at once")
    add_number(parser, "--minutes", 10, "Minutes for each server")
    add_number(parser, "--tokens", 32, "Tokens of each answer")
    args = parser.parse_args()
    results = measure(args)
    show(*map(make_table, results))
    about = {"kind": "mixed load", "machine": machine(), "command": " ".join(sys.argv)}
    Path(args.json).write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
