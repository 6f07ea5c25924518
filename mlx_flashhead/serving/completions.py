"""Completions: the texts that answer a request, from its fields to the end of the response."""

import asyncio
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..common.guarded import MAX_HELPERS, LeftError, unless_left
from ..models.call_parsers import read_tool_calls
from ..version import __version__
from .answer_text import Progress, Token
from .api_errors import ApiError
from .bodies import json_response, write_json
from .choices import Choice, usage_of
from .decoding import Job, read_jobs
from .engine import Engine
from .requests import Request
from .served_models import ServedModel
from .turns import Turns

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
LOADING = "The model is being loaded: try again in a moment."
_LOOK_SECONDS = 0.25  # between two looks whether a client still waits for its request to be read
_TICK_SECONDS = 1.0  # between comments of a stream whose model is being loaded
_MAX_WAITING_BYTES = 32 << 20  # of the bodies that wait for a model
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # else nginx holds back
# Fields whose grammars take long to compile.
_FORMS = ("response_format", "regex", "grammar", "tools")
# Fields without effect that the log names: of any number, which clients choose.
_MAX_FIELDS_NAMED = 100
_MAX_FIELD_NAME = 40  # characters

logger = logging.getLogger(__name__)


class Service:
    """What all completions share.

    Attributes:
        engine: What computes them.
        end: Why no request is answered any more.
        in_progress: The completions that have not ended.
        n_waiting_bytes: Of the bodies that wait for a model.
        call_readers: The turns of reading calls that models write.
    """

    def __init__(self, flags: Namespace, engine: Engine):
        self.flags = flags
        self.engine = engine
        self.end: ApiError | None = None
        self.in_progress: set[Completion] = set()
        self.n_waiting_bytes = 0
        self._named: set[str] = set()  # fields without effect that the log has named
        self._readers = Turns("read", total=MAX_HELPERS, each=2)
        self._grammar_readers = Turns("read grammar", total=6, each=2)
        self.call_readers = Turns("read calls", total=4, each=1)

    def end_answers(self, message: str) -> None:
        """Ends the completions in progress, and those to come, with an error."""
        self.end = ApiError(message, status=503)
        for completion in list(self.in_progress):
            completion.put((0, self.end))

    @property
    def models(self) -> list[ServedModel]:
        """The models, the default first; an ApiError while there are none."""
        if self.end is not None:
            raise self.end
        loaded = self.engine.models
        if not loaded.done():
            raise still_loading()
        if loaded.exception() is not None:
            raise ApiError("The model cannot be loaded: see the server's log.", status=503)
        return loaded.result()

    async def read_jobs(self, fields: dict[str, Any], request: HttpRequest) -> list[Job]:
        """The answers that a request asks for; an ApiError if it is wrong."""
        read = partial(
            read_jobs,
            fields,
            chat=request.scope["path"] in CHAT_PATHS,
            models=self.models,
            flags=self.flags,
        )
        has_form = any(fields.get(name) is not None for name in _FORMS)
        readers = self._grammar_readers if has_form else self._readers
        async with readers.turn(address_of(request)):
            jobs = await self._read_unless_left(readers, read, request)
        self._name_ignored(jobs[0].request.ignored)
        return jobs

    @staticmethod
    async def _read_unless_left(
        readers: Turns, read: Callable[[], list[Job]], request: HttpRequest
    ) -> list[Job]:
        """Reads a request as long as its client waits."""
        left = Event()
        if await request.is_disconnected():
            raise ClientDisconnect
        reading = asyncio.ensure_future(readers.work(partial(unless_left, left, read)))
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # is looked at
        try:
            while not (await asyncio.wait([reading], timeout=_LOOK_SECONDS))[0]:
                if await request.is_disconnected():
                    left.set()
            return reading.result()
        except LeftError:
            raise ClientDisconnect from None
        finally:
            left.set()

    def _name_ignored(self, fields: list[str]) -> None:
        """Names fields of a request that have no effect, each once, in the log."""
        new = {field[:_MAX_FIELD_NAME] for field in fields} - self._named
        listed = sorted(new)[: _MAX_FIELDS_NAMED - len(self._named)]
        if listed:
            self._named |= set(listed)
            names = ", ".join(ascii(field)[1:-1] for field in listed)
            logger.info("Fields without effect here, named once: %s", names)


def still_loading() -> ApiError:
    """The error while the models are being loaded, whose code the page knows."""
    return ApiError(LOADING, status=503, code="model_loading")


def address_of(connection: HTTPConnection) -> str:
    """The address of a client."""
    return connection.scope["client"][0]


class Completion:
    """The response to a request for texts, whole or in server-sent events.

    One that comes before its model waits, and a stream has comments meanwhile, so that no client
    and no proxy gives up.

    Its queue has, in order, events of the engine, a client that leaves, the end. None says that the
    models have been loaded.
    """

    def __init__(self, service: Service, fields: dict[str, Any], http_request: HttpRequest):
        self._service = service
        self._fields = fields
        self._http_request = http_request
        self._notes: list[str] = http_request.state.notes
        self._address = address_of(http_request)
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Any]()
        self._jobs: list[Job] = []  # once the request has been read

    async def read(self) -> None:
        """Reads the request, whose model has been loaded; an ApiError if it is wrong."""
        self._jobs = await self._service.read_jobs(self._fields, self._http_request)
        for job in self._jobs:
            job.events = self
            job.address = self._address
        request = self._jobs[0].request
        self._request = request
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
        if self._service.end is not None:
            raise self._service.end
        watch = asyncio.create_task(self._watch(receive))
        self._service.in_progress.add(self)
        try:
            if self._fields.get("stream") is True:
                events = (f"{event}\n\n" async for event in self._events())
                response = StreamingResponse(
                    events, headers=_STREAM_HEADERS, media_type="text/event-stream"
                )
                await response.stream_response(send)
            else:
                async for _ in self._comments_while_loading():
                    pass
                async for _ in self._parts():
                    pass  # the choices keep them
                whole = await asyncio.to_thread(self._whole)
                await whole(scope, receive, send)
        finally:
            watch.cancel()
            self._service.in_progress.discard(self)
            for job in self._jobs:
                job.ended = True
            if self._jobs:
                self._note()

    def _note(self) -> None:
        """Says in the log what was computed."""
        tokens = "{prompt_tokens:,} + {completion_tokens:,} tokens".format(**usage_of(self._jobs))
        rate = speed_of(self._jobs)
        speed = [] if rate is None else [f"{rate:.1f} tokens/s"]
        self._notes[:0] = [self._request.served.name, tokens, *speed, self._decoding()]

    async def _watch(self, receive: Receive) -> None:
        """Ends the jobs when the client has left."""
        while (await receive())["type"] != "http.disconnect":
            pass
        for job in self._jobs:
            job.ended = True  # at once, whatever is still in the queue
        self.put((0, ClientDisconnect()))

    async def _comments_while_loading(self) -> AsyncIterator[str]:
        """Waits for the models if need be, with comments, and reads the request.

        Raises:
            ApiError: If the models do not come in time, too much waits, the server ends, or the
                request is wrong.
            ClientDisconnect: If the client leaves.
        """
        service = self._service
        models = service.engine.models
        if not models.done():
            n_bytes = int(self._http_request.headers["Content-Length"])
            until = time.monotonic() + service.flags.load_wait
            models.add_done_callback(lambda _: self.put((0, None)))
            service.n_waiting_bytes += n_bytes
            try:
                if service.n_waiting_bytes > _MAX_WAITING_BYTES:  # those that came before stay
                    raise still_loading()
                while not models.done():
                    yield ": loading"
                    await self._wait(until - time.monotonic())
            finally:
                service.n_waiting_bytes -= n_bytes
        if not self._jobs:
            await self.read()

    async def _wait(self, seconds: float) -> None:
        """Waits for the models, for so many seconds in all, until the next comment is due."""
        if seconds <= 0:
            raise still_loading()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(_TICK_SECONDS, seconds)):
                _, event = await self._queue.get()
            if event is not None:
                raise event

    async def _parts(self) -> AsyncIterator[Progress | dict[str, Any]]:
        """The results of the jobs until all are complete: parts of prompts, and chunks' choices."""
        self._service.engine.submit(self._jobs)
        self._choices = [Choice(self._request, job.index) for job in self._jobs]
        while any(choice.finish_reason is None for choice in self._choices):
            index, event = await self._queue.get()
            if isinstance(event, ApiError | ClientDisconnect):
                raise event
            if isinstance(event, BaseException):
                raise ApiError("The answer has failed: see the server's log.", status=500)
            if isinstance(event, Progress):
                yield event
            elif event is not None:
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
                calls += await self._service.call_readers.run(self._address, read)
            except ValueError:
                content += text
        return replace(token, content=content, calls=calls)

    def _whole(self) -> Response:
        choices = [choice.whole() for choice in self._choices]
        return json_response(self._common | {"choices": choices, "usage": usage_of(self._jobs)})

    async def _events(self) -> AsyncIterator[str]:
        """What a stream sends. Clients ignore the comments, which begin with a colon."""
        try:
            async for comment in self._comments_while_loading():
                yield comment
            head = self._common | ({"usage": None} if self._request.include_usage else {})
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
        if (speed := speed_of(self._jobs)) is not None:
            yield f": {speed:.2f} tokens/s"
        if self._request.include_usage:
            usage = {"choices": [], "usage": usage_of(self._jobs)}
            yield f"data: {write_json(self._common | usage)}"
        yield "data: [DONE]"

    def _decoding(self) -> str:
        request = self._request
        return request.served.decoding(dense=request.dense, n_probes=request.n_probes)


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
