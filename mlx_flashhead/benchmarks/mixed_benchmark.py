"""Puts one server under a mixed load, and compares each answer with the one it has alone.

Clients send what a server has to keep apart: streams and whole answers, several texts at once,
samplers with seeds, penalties, grammars, tools, prompts of different lengths. Some hang up.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from random import Random
from threading import Event, Lock
from typing import Any, NamedTuple

from rich.table import Table

from ..common.guarded import memory_of
from ..common.tables import new_table
from ..models.fetch import resolve
from .reporting import Case
from .server_benchmark import ANSWER_SECONDS, SENTENCE, TOPICS, head_flags
from .server_process import HOST, ServerProcess, serving

CLIENTS = (16,)
TOKENS = 32  # of an answer
ROUND_SECONDS = 60.0  # of the load; answers that have begun are completed
SHARE_THAT_LEAVES = 0.2
PROBE_SECONDS = 0.5  # between two looks at the server's health and memory
MOST_SHOWN = 5  # problems, or answers that differ
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
LENGTHS = (0, 3, 24)  # sentences before the question


class Question(NamedTuple):
    """A request that is repeated, streamed or not."""

    model: str
    kind: str
    path: str
    body: str  # JSON of all fields but those that ask for a stream


class Text(NamedTuple):
    """One of the texts of an answer, without what is new in each answer, such as ids."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]  # names and arguments
    finish_reason: str | None


class Answer(NamedTuple):
    """What a client has received."""

    texts: tuple[Text, ...]
    n_tokens: int


def cases(args: argparse.Namespace) -> Generator[Case]:
    """Runs a server of all models, and with ``--kv-bits`` then one of the first with that."""
    folders = [str(resolve(model)) for model in (args.model, *args.allow_models)]
    flags = ["--model", folders[0], *head_flags(args)]
    servers = {"all models": [*flags, *(["--allow-models", *folders[1:]] if folders[1:] else [])]}
    if args.kv_bits is not None:
        quantized = ["--kv-bits", str(args.kv_bits), "--quantized-kv-start", "0"]
        servers[f"--kv-bits {args.kv_bits}"] = [*flags, *quantized]
    for name, server_flags in servers.items():
        print(f"A server starts: {name}.", file=sys.stderr, flush=True)
        with serving("mlx_flashhead.server", *server_flags) as server:
            for n_clients in args.clients or CLIENTS:
                load = MixedLoad(server, name, n_clients, args.tokens or TOKENS)
                case_name = f"{name}, {n_clients} clients, per answer"
                yield Case(case_name, {"mixed": load.take_round}, load.figures)


class MixedLoad:
    """A load of one server, in rounds.

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
        self._left_out: dict[str, str] = {}  # why, by model and kind
        self._lock = Lock()  # of all below
        self._n_answered: Counter[str] = Counter()  # by kind
        self._n_as_alone: Counter[str] = Counter()
        self._n_tokens_generated = 0
        self._n_hung_up = 0
        self._problems: list[str] = []
        self._differences: list[dict[str, Any]] = []
        self._health_seconds: list[float] = []
        self._memory: list[int] = []  # bytes

    def take_round(self, number: int) -> float:
        """Asks each question alone in round 0, and all clients' at once in the others.

        Returns:
            The seconds for an answer, of all clients together.
        """
        began = time.monotonic()
        if number == 0:
            self._ask_alone()
            return (time.monotonic() - began) / max(1, len(self._alone))
        n_before = self._n_answered.total()
        ended = Event()
        with ThreadPoolExecutor(self._n_clients + 1) as pool:
            probe = pool.submit(self._probe, ended)
            clients = [
                pool.submit(self._ask_until, ended, Random(f"{number} {client}"))
                for client in range(self._n_clients)
            ]
            try:
                ended.wait(ROUND_SECONDS)
            finally:  # also at Ctrl-C
                ended.set()
        for worker in (probe, *clients):
            worker.result()  # or its error
        return (time.monotonic() - began) / max(1, self._n_answered.total() - n_before)

    def _ask_alone(self) -> None:
        """Asks each question while nobody else asks. Kinds that a model refuses are left out."""
        for model in served_models(self._server.port):
            questions = questions_of(model, self._n_tokens)
            progress = f"{model} answers {len(questions)} questions alone."
            print(progress, file=sys.stderr, flush=True)
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

    def _ask_until(self, ended: Event, random: Random) -> None:
        """A client: asks one question after the other."""
        several = list(self._alone)
        while not ended.is_set():
            question = random.choice(several)
            stream = random.random() < 0.6
            patience = random.uniform(0, 1) if random.random() < SHARE_THAT_LEAVES else None
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
            self._n_tokens_generated += answer.n_tokens
            if answer == expected:
                self._n_as_alone[question.kind] += 1
            else:
                difference = {
                    "model": question.model,
                    "kind": question.kind,
                    "alone": [text.content for text in expected.texts],
                    "beside_others": [text.content for text in answer.texts],
                }
                self._differences.append(difference)

    def _probe(self, ended: Event) -> None:
        """Looks at the server's health and memory now and then."""
        while not ended.wait(PROBE_SECONDS):
            began = time.monotonic()
            try:
                get(self._server.port, "/health")
            except (OSError, ValueError) as error:
                with self._lock:
                    self._problems.append(f"/health: {error}"[:300])
            self._health_seconds.append(time.monotonic() - began)
            self._memory.append(memory_of(self._server.pid))

    def figures(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """The figures so far, JSON-ready, after rounds whose answers took ``seconds`` each."""
        megabytes = [round(size / 1e6) for size in self._memory] or [0]
        with self._lock:
            n_answered = self._n_answered.total()
            return {
                "server": self._name,
                "models": sorted({question.model for question in self._alone}),
                "clients": self._n_clients,
                "tokens": self._n_tokens,
                "minutes": len(seconds["mixed"]) * ROUND_SECONDS / 60,
                "questions": len(self._alone),
                "answered": n_answered,
                "as_alone": self._n_as_alone.total(),
                "hung_up": self._n_hung_up,
                "lost": len(self._problems),
                "kinds": {
                    kind: {"answered": number, "as_alone": self._n_as_alone[kind]}
                    for kind, number in sorted(self._n_answered.items())
                },
                "answers_per_second": 1 / (sum(seconds["mixed"]) / len(seconds["mixed"])),
                "tokens_generated": self._n_tokens_generated,
                "health_worst_seconds": max(self._health_seconds, default=None),
                "memory_mb": {
                    "first": megabytes[0],
                    "last": megabytes[-1],
                    "most": max(megabytes),
                },
                "tracebacks": sum(line.startswith("Traceback") for line in self._server.log()),
                "left_out": dict(self._left_out),
                "problems": self._problems[:MOST_SHOWN],
                "differences": self._differences[:MOST_SHOWN],
            }


def make_table(result: dict[str, Any]) -> Table:
    """The table of one load, by kinds of requests."""
    title = (
        "{server}: {clients} clients for {minutes:g} minutes, {answered:,} answers of "
        "{questions} questions"
    )
    caption = [
        "as alone: complete answers with the texts that the question has alone.",
        "Of {answered:,} answers {as_alone:,} are as alone. {hung_up:,} clients hung up, {lost:,} "
        "answers were lost, and the log has {tracebacks} tracebacks.",
        "Memory in MB: {memory_mb[first]:,} first, {memory_mb[last]:,} last, {memory_mb[most]:,} "
        "at most. Worst time of /health: {health_worst_seconds:.2f} s.",
        *(f"Left out: {kind}: {why}" for kind, why in result["left_out"].items()),
        *result["problems"],
        *(f"Differs: {each['model']}, {each['kind']}" for each in result["differences"]),
    ]
    health = result["health_worst_seconds"] or 0.0
    lines = [
        line.format(**result | {"health_worst_seconds": health}) if i < 3 else line
        for i, line in enumerate(caption)
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
    timeout = ANSWER_SECONDS if patience is None else max(0.01, patience)
    leaves_at = time.monotonic() + timeout
    lines = []
    try:
        with closing(HTTPConnection(HOST, port, timeout=timeout)) as client:
            headers = {"Content-Type": "application/json"}
            client.request("POST", question.path, json.dumps(fields), headers)
            response = client.getresponse()
            for line in response:
                lines.append(line)
                if patience is not None and time.monotonic() >= leaves_at:
                    raise HungUpError
    except HTTPException as error:
        raise ValueError(f"the answer broke off: {error!r}") from error
    except TimeoutError:
        if patience is None:
            raise
        raise HungUpError from None
    content = b"".join(lines)
    if response.status == 400:
        raise RefusedError(json.loads(content)["error"]["message"])
    if response.status != 200:
        raise ValueError(f"{response.status}: {content.decode(errors='replace')}")
    return read_stream(lines) if stream else read_whole(json.loads(content))


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
