"""Answers requests of OpenAI's API."""

from argparse import Namespace
from collections.abc import Iterator
from http import HTTPStatus
from queue import Empty
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import unquote

from .engine.engine import Engine
from .engine.jobs import Job, Progress, Token, jobs_of
from .network.connections import LimitedServer
from .network.guard import GuardedHandler
from .protocol.api_error import ApiError, dumps, loads
from .protocol.completions import Choice, envelope
from .protocol.requests import find_model, read_request
from .served_models import ServedModel

MODELS_PATH = "/v1/models"
CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
TEXT_PATHS = ("/v1/completions",)
# How often a waiting client's connection is checked.
_LOOK_SECONDS = 0.25
_PREPARED_AT_ONCE = 8


class ApiServer(LimitedServer):
    """A server, with the state that all requests share."""

    flags: Namespace
    engine: Engine
    models: list[ServedModel]  # the default first
    started: int  # in seconds since 1970
    # held while a body becomes tokens, which may take many times its size
    preparing = BoundedSemaphore(_PREPARED_AT_ONCE)


class ApiHandler(GuardedHandler):
    server: ApiServer

    def get(self, path: str) -> None:
        server = self.server
        if path == "/health":
            heads = [served.head_in_use for served in server.models]
            word, status = ("ok", 200) if server.engine.healthy else ("unavailable", 503)
            self.send_json({"status": word, "heads": heads}, status)
        elif path == "/page/info.json":
            flags, models = server.flags, [*map(_page_model, server.models)]
            settings = {"temperature": flags.temp, "top_p": flags.top_p}
            self.send_json(settings | {"max_tokens": flags.max_tokens, "models": models})
        elif path == MODELS_PATH:
            names = [name for served in server.models for name in served.names]
            self.send_json({"object": "list", "data": [*map(self._model, names)]})
        elif path.startswith(f"{MODELS_PATH}/"):
            self.send_json(self._model(unquote(path.removeprefix(f"{MODELS_PATH}/"))))
        else:
            raise ApiError(f"There is nothing at {path[:200]}.", status=404)

    def post(self, path: str) -> None:
        server, chat = self.server, path in CHAT_PATHS
        if path not in CHAT_PATHS + TEXT_PATHS:
            places = ", ".join(TEXT_PATHS + CHAT_PATHS)
            raise ApiError(f"There is nothing at {path[:200]}: post to {places}.", status=404)
        with server.answering(self.connection, self.client_address[0]):
            body = self.read_body()
            with server.preparing:
                request = read_request(
                    _parsed(body), chat=chat, models=server.models, defaults=server.flags
                )
                jobs = jobs_of(request)
            del body
            server.engine.submit(jobs)
            try:
                self._stream(jobs) if request.stream else self._send_whole(jobs)
            finally:
                for job in jobs:
                    job.cancelled = True
                tokens = "{prompt_tokens:,} + {completion_tokens:,} tokens"
                self.note(tokens.format(**_usage(jobs)))
                if (speed := speed_of(jobs)) is not None:
                    self.note(f"{speed:.1f} tokens/s")

    def _send_whole(self, jobs: list[Job]) -> None:
        head = envelope(jobs[0].request)
        choices = [Choice(job.request, job.index) for job in jobs]
        for _ in self._parts(jobs, choices):
            pass  # the choices keep them
        whole = [choice.whole() for choice in choices]
        self.send_json(head | {"choices": whole, "usage": _usage(jobs)})

    def _stream(self, jobs: list[Job]) -> None:
        request = jobs[0].request
        head = envelope(request)
        last = head | {"choices": []}
        if request.include_usage:
            head["usage"] = None
        choices = [Choice(request, job.index) for job in jobs]
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            for part in self._parts(jobs, choices):
                if isinstance(part, Progress):  # a comment, which clients ignore and the page shows
                    self._write(f": prompt {part.done}/{part.total}")
                else:
                    self._write(f"data: {dumps(head | {'choices': [part]})}")
        except ApiError as problem:
            self._write(f"data: {dumps(problem.as_json())}")
            return
        if (speed := speed_of(jobs)) is not None:
            self._write(f": {speed:.2f} tokens/s")
        if request.include_usage:
            self._write(f"data: {dumps(last | {'usage': _usage(jobs)})}")
        self._write("data: [DONE]")

    def _parts(self, jobs: list[Job], choices: list[Choice]) -> Iterator[Progress | dict[str, Any]]:
        """What comes of the jobs until all are complete: parts of prompts, and chunks' choices."""
        while any(choice.finish_reason is None for choice in choices):
            try:
                index, event = jobs[0].events.get(timeout=_LOOK_SECONDS)
            except Empty:
                event = None
            if self.client_has_gone():
                raise ConnectionAbortedError
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, BaseException):
                raise ApiError("The answer has failed: see the server's log.", status=500)
            if isinstance(event, Progress):
                yield event
            elif isinstance(event, Token):
                if (chunk := choices[index].add(event)) is not None:
                    yield chunk
            elif not self.server.engine.healthy:
                raise ApiError("The server has lost the thread that answers.", status=503)

    def _write(self, line: str) -> None:
        self.wfile.write(f"{line}\n\n".encode())

    def _model(self, name: str) -> dict[str, Any]:
        served = find_model(self.server.models, name)
        return {
            "id": name,
            "object": "model",
            "created": self.server.started,
            "owned_by": "mlx_flashhead",
            "head": served.head_in_use,
        }


def _page_model(served: ServedModel) -> dict[str, Any]:
    if (head := served.head) is None:
        return {"name": served.name}
    probes = {"n_probes": head.n_probes, "n_clusters": head.n_clusters}
    return {"name": served.name, "dense": served.dense} | probes


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = loads(body)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ApiError("The body must be a JSON object.")
    return value


def _usage(jobs: list[Job]) -> dict[str, Any]:
    once = jobs[:: jobs[0].request.n]  # a prompt with several answers counts once
    prompt_tokens = sum(len(job.prompt.tokens) for job in once)
    completion_tokens = sum(len(job.tokens) for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in once)},
    }


def speed_of(jobs: list[Job]) -> float | None:
    """Tokens per second after the first of each answer; None if there are none."""
    times = [moment for job in jobs for moment in job.times]
    seconds = max(times, default=0.0) - min(times, default=0.0)
    n_tokens = sum(max(0, len(job.tokens) - 1) for job in jobs)
    return n_tokens / seconds if n_tokens and seconds > 0 else None
