"""Answers requests of OpenAI's API: in the event loop, with what the engine's thread computes."""

import asyncio
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from .access import json_response, read_body
from .api_error import ApiError, dumps
from .completions import Choice, envelope
from .engine import Engine
from .jobs import Job, Progress, read_jobs
from .page_files import PAGE_ROUTES
from .requests import find_model
from .served_models import ServedModel

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
TEXT_PATHS = ("/v1/completions",)
_PREPARED_AT_ONCE = 8
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
)


class Api:
    """The endpoints, with the state that all requests share."""

    def __init__(self, flags: Namespace, engine: Engine):
        self.engine, self._flags, self._started = engine, flags, int(time.time())
        self._end: ApiError | None = None  # why no request is answered any more
        self._answers: set[Answer] = set()  # in progress
        # where bodies become tokens, which may take many times their size
        self._readers = ThreadPoolExecutor(_PREPARED_AT_ONCE, "read")

    def router(self) -> Router:
        """The paths."""
        posts = [Route(path, self.complete, methods=["POST"]) for path in CHAT_PATHS + TEXT_PATHS]
        gets = [
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/page/info.json", self.page_info),
        ]
        return Router([*posts, *gets, *PAGE_ROUTES], redirect_slashes=False)

    def fail_answers(self, message: str, *, for_good: bool = False) -> None:
        """Ends the answers in progress with an error; ``for_good`` also those to come."""
        problem = ApiError(message, status=503)
        self._end = problem if for_good else self._end
        for answer in list(self._answers):
            answer.put((0, problem))

    async def health(self, request: HttpRequest) -> Response:
        status = self.engine.status
        value: dict[str, Any] = {"status": status}
        if status != "loading":
            value["decoding"] = {served.name: served.decoding() for served in self._models}
        return json_response(value, 200 if status == "ok" else 503)

    async def list_models(self, request: HttpRequest) -> Response:
        names = [name for served in self._models for name in served.names]
        return json_response({"object": "list", "data": [*map(self._model, names)]})

    async def show_model(self, request: HttpRequest) -> Response:
        return json_response(self._model(request.path_params["name"]))

    async def page_info(self, request: HttpRequest) -> Response:
        """What the page needs: the models, and the defaults of requests."""
        flags = self._flags
        settings = {"temperature": flags.temp, "top_p": flags.top_p, "max_tokens": flags.max_tokens}
        return json_response(settings | {"models": [*map(_page_model, self._models)]})

    async def complete(self, request: HttpRequest) -> "Answer":
        """Answers a chat, or continues texts."""
        models, chat = self._models, request.scope["path"] in CHAT_PATHS
        body = await read_body(request)
        read = partial(read_jobs, body, chat=chat, models=models, flags=self._flags)
        jobs = await asyncio.get_running_loop().run_in_executor(self._readers, read)
        return Answer(self, jobs, request.state.notes)

    def begin(self, answer: "Answer") -> None:
        if self._end is not None:
            raise self._end
        self._answers.add(answer)
        self.engine.submit(answer.jobs)

    def end(self, answer: "Answer") -> None:
        """Stops what is still computed of an answer."""
        self._answers.discard(answer)
        for job in answer.jobs:
            job.cancelled = True

    @property
    def _models(self) -> list[ServedModel]:
        """The models, the default first; an ApiError while there are none."""
        if self._end is not None:
            raise self._end
        if not self.engine.models.done():
            raise ApiError("The model is being loaded: try again in a moment.", status=503)
        return self.engine.models.result()

    def _model(self, name: str) -> dict[str, Any]:
        served = find_model(self._models, name)
        owner = {"created": self._started, "owned_by": "mlx_flashhead"}
        return {"id": name, "object": "model", "decoding": served.decoding()} | owner


class Answer:
    """The response to a request for texts, whole or as a stream of server-sent events.

    Its queue has what happens, in order: events of the engine, a client that leaves, the end.
    """

    def __init__(self, api: Api, jobs: list[Job], notes: list[str]):
        self.jobs, self._api, self._notes, self._request = jobs, api, notes, jobs[0].request
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self._choices = [Choice(job.request, job.index) for job in jobs]
        for job in jobs:
            job.events = self

    def put(self, event: tuple[int, Any]) -> None:
        """Adds an event with the index of its job, from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            self._api.begin(self)
            if self._request.stream:
                await self._stream(send)
            else:
                async for _ in self._parts():
                    pass  # the choices keep them
                response = await asyncio.to_thread(self._whole)
                await response(scope, receive, send)
        finally:
            watch.cancel()
            self._api.end(self)
            self._note()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._api.end(self)  # at once, whatever is still in the queue
        self.put((0, ClientDisconnect()))

    async def _parts(self) -> AsyncIterator[Progress | dict[str, Any]]:
        """What comes of the jobs until all are complete: parts of prompts, and chunks' choices."""
        while any(choice.finish_reason is None for choice in self._choices):
            index, event = await self._queue.get()
            if isinstance(event, ApiError | ClientDisconnect):
                raise event
            if isinstance(event, BaseException):
                raise ApiError("The answer has failed: see the server's log.", status=500)
            if isinstance(event, Progress):
                yield event
            elif (chunk := self._choices[index].add(event)) is not None:
                yield chunk

    def _whole(self) -> Response:
        choices = [choice.whole() for choice in self._choices]
        usage = _usage(self.jobs)
        return json_response(envelope(self._request) | {"choices": choices, "usage": usage})

    async def _stream(self, send: Send) -> None:
        async def write(line: str, more: bool = True) -> None:
            body = f"{line}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        common = envelope(self._request)
        head = common | ({"usage": None} if self._request.include_usage else {})
        headers = [*_STREAM_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for part in self._parts():
                if isinstance(part, Progress):  # a comment, which clients ignore and the page shows
                    await write(f": prompt {part.done}/{part.total}")
                else:
                    await write(f"data: {dumps(head | {'choices': [part]})}")
        except ApiError as problem:
            self._notes.append(f"ended by an error: {problem}")
            await write(f"data: {dumps(problem.as_json())}", more=False)
            return
        await write(f": decoding {self._decoding}")
        if (speed := speed_of(self.jobs)) is not None:
            await write(f": {speed:.2f} tokens/s")
        if self._request.include_usage:
            last = common | {"choices": [], "usage": _usage(self.jobs)}
            await write(f"data: {dumps(last)}")
        await write("data: [DONE]", more=False)

    @property
    def _decoding(self) -> str:
        request = self._request
        return request.served.decoding(dense=request.dense, n_probes=request.n_probes)

    def _note(self) -> None:
        """Describes the answer for the log."""
        usage, speed = _usage(self.jobs), speed_of(self.jobs)
        tokens = "{prompt_tokens:,} + {completion_tokens:,} tokens".format(**usage)
        rate = [] if speed is None else [f"{speed:.1f} tokens/s"]
        self._notes[:0] = [self._request.served.name, tokens, *rate, self._decoding]


def _page_model(served: ServedModel) -> dict[str, Any]:
    model = {"name": served.name, "dense": served.dense, "decoding": served.decoding()}
    if served.head is not None:
        flash_head = served.decoding(dense=False)  # Compare's other side
        model |= {"flash_head": flash_head, "n_probes": served.head.n_probes}
    return model


def _usage(jobs: list[Job]) -> dict[str, Any]:
    once = jobs[:: jobs[0].request.n]  # a prompt with several answers counts once
    n_read = sum(len(job.prompt.tokens) for job in once)
    n_generated = sum(len(job.tokens) for job in jobs)
    usage = {"prompt_tokens": n_read, "completion_tokens": n_generated}
    cached = {"cached_tokens": sum(job.cached for job in once)}
    return usage | {"total_tokens": n_read + n_generated, "prompt_tokens_details": cached}


def speed_of(jobs: list[Job]) -> float | None:
    """Tokens per second after the first of each answer; None if there are none."""
    times = [moment for job in jobs for moment in job.times]
    seconds = max(times, default=0.0) - min(times, default=0.0)
    n_tokens = sum(max(0, len(job.tokens) - 1) for job in jobs)
    return n_tokens / seconds if n_tokens and seconds > 0 else None
