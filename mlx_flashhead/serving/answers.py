"""The response to a request for texts: what the engine's thread computes, as it comes."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..models.call_parsers import read_tool_calls
from ..version import __version__
from .api_errors import ApiError
from .bodies import json_response, write_json
from .choices import Choice
from .engine import Engine
from .jobs import Job, Progress, Token
from .requests import Request
from .turns import Turns


class Answering(Protocol):
    """What answers have in common.

    Attributes:
        engine: What computes them.
        end: Why no request is answered any more.
        answers: Those in progress.
        call_readers: The turns of reading calls that models write.
    """

    engine: Engine
    end: ApiError | None
    answers: set["Answer"]
    call_readers: Turns


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def address_of(request: HttpRequest) -> str:
    """The address of a request's client."""
    return request.scope["client"][0]


class Answer:
    """The response to a request for texts, whole or in server-sent events.

    Its queue has, in order, events of the engine, a client that leaves, the end.
    """

    def __init__(self, api: Answering, jobs: list[Job], http_request: HttpRequest):
        self.jobs = jobs
        self._api = api
        self._request = jobs[0].request
        self._notes: list[str] = http_request.state.notes
        self._address = address_of(http_request)
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Any]()
        self._choices = [Choice(job.request, job.index) for job in jobs]
        for job in jobs:
            job.events = self
        request = self._request
        chat = "chat.completion.chunk" if request.stream else "chat.completion"
        self._common = {  # what all parts of an answer have beside their choices
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": chat if request.chat else "text_completion",
            "created": int(time.time()),
            "model": request.served.name,
            "system_fingerprint": f"mlx_flashhead-{__version__}",
        }

    def put(self, event: tuple[int, Any]) -> None:
        """Adds an event with the index of its job, from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generates the texts and sends them, as an ASGI application."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._api.end is not None:
                raise self._api.end
            self._api.answers.add(self)
            self._api.engine.submit(self.jobs)
            if self._request.stream:
                events = (f"{event}\n\n" async for event in self._events())
                stream = StreamingResponse(events, media_type="text/event-stream")
                stream.headers["Cache-Control"] = "no-store"
                stream.headers["X-Accel-Buffering"] = "no"  # nginx would hold pieces back
                await stream.stream_response(send)
            else:
                async for _ in self._parts():
                    pass  # the choices keep them
                response = await asyncio.to_thread(self._whole)
                await response(scope, receive, send)
        finally:
            watch.cancel()
            self._api.answers.discard(self)
            for job in self.jobs:
                job.ended = True
            tokens = "{prompt_tokens:,} + {completion_tokens:,} tokens".format(**self._usage())
            speed = [f"{rate:.1f} tokens/s"] if (rate := speed_of(self.jobs)) else []
            self._notes[:0] = [self._request.served.name, tokens, *speed, self._decoding()]

    async def _watch(self, receive: Receive) -> None:
        await disconnected(receive)
        for job in self.jobs:
            job.ended = True  # at once, whatever is still in the queue
        self.put((0, ClientDisconnect()))

    async def _parts(self) -> AsyncIterator[Progress | dict[str, Any]]:
        """The results of the jobs until all are complete: parts of prompts, and chunks' choices."""
        while any(choice.finish_reason is None for choice in self._choices):
            index, event = await self._queue.get()
            if isinstance(event, ApiError | ClientDisconnect):
                raise event
            if isinstance(event, BaseException):
                raise ApiError("The answer has failed: see the server's log.", status=500)
            if isinstance(event, Progress):
                yield event
            else:
                token = await self._with_calls(event)
                if (chunk := self._choices[index].add(token)) is not None:
                    yield chunk

    async def _with_calls(self, token: Token) -> Token:
        """The token with its calls in OpenAI's form. A text that is none is content after all."""
        content = token.content
        calls: list[dict[str, Any]] = []
        for text in token.calls:
            try:
                if not self._request.tools.offered:
                    raise ValueError("the request has no tools")
                read = partial(read_calls, self._request, text)
                calls += await self._api.call_readers.run(self._address, read)
            except ValueError:
                content += text
        return replace(token, content=content, calls=calls)

    def _whole(self) -> Response:
        choices = [choice.whole() for choice in self._choices]
        return json_response(self._common | {"choices": choices, "usage": self._usage()})

    async def _events(self) -> AsyncIterator[str]:
        """What a stream sends. Clients ignore the comments, which begin with a colon."""
        head = self._common | ({"usage": None} if self._request.include_usage else {})
        try:
            async for part in self._parts():
                if isinstance(part, Progress):
                    yield f": prompt {part.done}/{part.total}"
                else:
                    yield f"data: {write_json(head | {'choices': [part]})}"
        except ApiError as problem:
            self._notes.append(f"ended by an error: {problem}")
            yield f"data: {write_json(problem.as_json())}"
            return
        yield f": decoding {self._decoding()}"
        if (speed := speed_of(self.jobs)) is not None:
            yield f": {speed:.2f} tokens/s"
        if self._request.include_usage:
            yield f"data: {write_json(self._common | {'choices': [], 'usage': self._usage()})}"
        yield "data: [DONE]"

    def _decoding(self) -> str:
        request = self._request
        return request.served.decoding(dense=request.dense, n_probes=request.n_probes)

    def _usage(self) -> dict[str, Any]:
        once = self.jobs[:: self._request.n]  # a prompt with several answers counts once
        n_read = sum(len(job.prompt.tokens) for job in once)
        n_generated = sum(len(job.tokens) for job in self.jobs)
        return {
            "prompt_tokens": n_read,
            "completion_tokens": n_generated,
            "total_tokens": n_read + n_generated,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in once)},
        }


def speed_of(jobs: list[Job]) -> float | None:
    """Tokens per second after the first of each answer; None if there are none."""
    times = [moment for job in jobs for moment in job.times]
    seconds = max(times, default=0.0) - min(times, default=0.0)
    n_tokens = sum(max(0, len(job.tokens) - 1) for job in jobs)
    return n_tokens / seconds if n_tokens and seconds > 0 else None


def read_calls(request: Request, text: str) -> list[dict[str, Any]]:
    """Returns the calls in a text that is marked as one, in OpenAI's form.

    Raises:
        ValueError: If the text is no call.
    """
    calls = []
    for call in read_tool_calls(request.served.tokenizer, text, request.tools.for_parser):
        try:
            function = {"name": call["name"], "arguments": write_json(call["arguments"])}
            number = call.get("id") or f"call_{uuid.uuid4().hex}"
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The parser's call lacks a part: {error!r}") from None
        calls.append({"id": number, "type": "function", "function": function})
    return calls
