"""Completions: the texts that answer a request, from its fields to the end of the response."""

import asyncio
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any
from weakref import WeakSet

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..common.guarded import MAX_HELPERS, LeftError, unless_left
from ..models.call_parsers import read_tool_calls
from .answer_text import PromptProgress, Token
from .api_errors import ApiError
from .bodies import json_response, write_json
from .choices import CHATS, usage_of
from .connections import MAX_ANSWERED
from .dialects import Answer, Dialect, StreamEvent
from .engine import Engine
from .jobs import Job, read_jobs
from .requests import Request
from .served_models import ServedModel
from .turns import Turns

LOADING = "The model is being loaded: try again in a moment."
# A stream whose model is being loaded has a comment each second.
_TICK_SECONDS = 1.0
# A stream says that it is alive after so many seconds. Node gives up after 300, some proxies after
# 60. A call of a tool is sent when it is complete.
_SILENT_SECONDS = 10.0
# The bodies that wait for a model may have so many bytes together.
_MAX_WAITING_BYTES = 32 << 20
# Without the second header nginx holds events back.
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
# The log names so many fields without effect, by so many characters: clients choose both.
_MAX_FIELDS_NAMED = 100
_MAX_FIELD_NAME = 40

logger = logging.getLogger(__name__)


class Service:
    """What all completions share.

    Attributes:
        engine: What computes them.
        end: Why no request is answered any more.
        in_progress: The completions that may not have ended.
        n_waiting_bytes: Of the bodies that wait for a model.

    The other ones are turns of clients' addresses: in each step from bodies to answers.
    """

    def __init__(self, flags: Namespace, engine: Engine):
        self.flags = flags
        self.engine = engine
        self.started = int(time.time())
        self.end: ApiError | None = None
        self.in_progress: WeakSet[Completion] = WeakSet()
        self.n_waiting_bytes = 0
        # The fields without effect that the log has named.
        self._named: set[str] = set()
        self.large_bodies = Turns("receive", total=MAX_ANSWERED, each=1)
        # Python reads one JSON at a time in any case.
        self.parsers = Turns("parse", total=1, each=1)
        self.readers = Turns("read", total=MAX_HELPERS, each=2)
        self.grammar_readers = Turns("read grammar", total=6, each=2)
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

    def name_ignored(self, fields: list[str]) -> None:
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


class Completion:
    """The response to a request for texts, whole or in server-sent events.

    One that comes before its model waits, and a stream has comments meanwhile, so that no client
    and no proxy gives up.

    Its queue has, in order, events of the engine, a client that leaves, the end. None says that the
    models have been loaded.
    """

    def __init__(
        self,
        service: Service,
        dialect: Dialect,
        body: dict[str, Any],
        http_request: HttpRequest,
    ):
        self._service = service
        self._dialect = dialect
        self._body = body
        self._http_request = http_request
        self._notes: list[str] = http_request.state.notes
        self._address: str = http_request.scope["client"][0]
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Any]()
        # There are jobs and an answer once the request has been read.
        self._jobs: list[Job] = []
        self._answer: Answer | None = None
        self._client_has_left = Event()
        self._watching = asyncio.create_task(self._watch())
        service.in_progress.add(self)

    async def read(self) -> None:
        """Reads the request, whose model has been loaded; an ApiError if it is wrong."""
        readers = self._service.readers
        if any(self._body.get(name) is not None for name in self._dialect.forms):
            readers = self._service.grammar_readers
        read = partial(unless_left, self._client_has_left, self._read_jobs)
        try:
            self._jobs = await readers.run(self._address, read)
        except LeftError:
            raise ClientDisconnect from None
        self._request = self._jobs[0].request
        self._service.name_ignored(self._request.ignored)
        self._answer = self._dialect.answer(self._jobs, self._body)

    def _read_jobs(self) -> list[Job]:
        service = self._service
        dialect = self._dialect
        try:
            return read_jobs(
                dialect.fields(self._body),
                chat=dialect.chat,
                models=service.models,
                flags=service.flags,
                events=self,
                address=self._address,
                any_model=dialect.any_model,
            )
        except ApiError as error:
            raise error.renamed(CHATS.form, dialect.form) from None

    def put(self, event: tuple[int, Any]) -> None:
        """Adds an event with the index of its job, from any thread."""
        # The loop may have ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generates the texts and sends them, as an ASGI application."""
        try:
            if self._body.get("stream") is True:
                events = (f"{event}\n\n" async for event in self._events())
                response = StreamingResponse(
                    events, headers=_STREAM_HEADERS, media_type="text/event-stream"
                )
                await response.stream_response(send)
            else:
                # The answer keeps its parts.
                async for _ in self._parts():
                    pass
                whole = await asyncio.to_thread(self._whole)
                await whole(scope, receive, send)
        finally:
            for job in self._jobs:
                job.ended = True
            if self._jobs:
                self._note()

    def _note(self) -> None:
        """Says in the log what was computed."""
        usage = usage_of(self._jobs)
        notes = [
            self._request.served.name,
            f"{usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens",
        ]
        speed = speed_of(self._jobs)
        if speed is not None:
            notes.append(f"{speed:.1f} tokens/s")
        notes.append(self._decoding())
        self._notes[:0] = notes

    async def _watch(self) -> None:
        """Ends the jobs when the client has left, or has its answer."""
        while (await self._http_request.receive())["type"] != "http.disconnect":
            pass
        self._client_has_left.set()
        # The jobs end at once, whatever is still in the queue.
        for job in self._jobs:
            job.ended = True
        self.put((0, ClientDisconnect()))

    async def _comments_while_loading(self) -> AsyncIterator[str]:
        """Waits for the models, with a comment now and then.

        Raises:
            ApiError: If they do not come in time, too much waits, or the server ends.
            ClientDisconnect: If the client leaves.
        """
        service = self._service
        models = service.engine.models
        n_bytes = int(self._http_request.headers["Content-Length"])
        until = time.monotonic() + service.flags.load_wait
        models.add_done_callback(lambda _: self.put((0, None)))
        service.n_waiting_bytes += n_bytes
        try:
            # The last one leaves, and those that came before stay.
            if service.n_waiting_bytes > _MAX_WAITING_BYTES:
                raise still_loading()
            while not models.done():
                yield ": loading"
                seconds = min(_TICK_SECONDS, until - time.monotonic())
                if seconds <= 0:
                    raise still_loading()
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        _, event = await self._queue.get()
                    if event is not None:
                        raise event
        finally:
            service.n_waiting_bytes -= n_bytes

    async def wait(self) -> AsyncIterator[str]:
        """Waits until the request has been read, with a comment now and then."""
        if not self._jobs:
            async for comment in self._comments_while_loading():
                yield comment
            await self.read()

    async def _next_event(self) -> tuple[int, PromptProgress | Token] | None:
        """The next event of the engine, with the index of its text; None if it does not come soon.

        Raises:
            ApiError: If the answer has failed, or the server ends.
            ClientDisconnect: If the client leaves.
        """
        event = None
        with suppress(TimeoutError):
            async with asyncio.timeout(_SILENT_SECONDS):
                while event is None:
                    index, event = await self._queue.get()
        if event is None:
            return None
        if isinstance(event, ApiError | ClientDisconnect):
            raise event
        if isinstance(event, BaseException):
            raise ApiError("The answer has failed: see the server's log.", status=500)
        return index, event

    async def _parts(self) -> AsyncIterator[str | StreamEvent]:
        """What there is of an answer, in order: comments, and events."""
        async for comment in self.wait():
            yield comment
        self._service.engine.submit(self._jobs)
        answer = self._answer
        # The request has been read, so there is an answer.
        assert answer is not None
        silent_since = time.monotonic()
        async for parts in self._additions(answer):
            if not parts and time.monotonic() - silent_since >= _SILENT_SECONDS:
                parts = [self._dialect.silence]
            for part in parts:
                silent_since = time.monotonic()
                yield part
        yield f": decoding {self._decoding()}"
        speed = speed_of(self._jobs)
        if speed is not None:
            yield f": {speed:.2f} tokens/s"
        for each in answer.end():
            yield each

    async def _additions(self, answer: Answer) -> AsyncIterator[list[str | StreamEvent]]:
        """What each event of the engine adds to an answer; nothing now and then if none comes."""
        has_begun = False
        while not answer.is_complete:
            parts: list[str | StreamEvent] = []
            found = await self._next_event()
            if found is not None:
                index, event = found
                if not has_begun:
                    parts += answer.begin()
                has_begun = True
                if isinstance(event, PromptProgress):
                    parts.append(f": prompt {event.done}/{event.total}")
                else:
                    parts += answer.add(index, await self._with_calls(event))
            yield parts

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
        # The answer is complete, so there is one.
        assert self._answer is not None
        return json_response(self._answer.whole())

    async def _events(self) -> AsyncIterator[str]:
        """What a stream sends. Clients ignore the comments, which begin with a colon."""
        try:
            async for part in self._parts():
                if isinstance(part, str):
                    yield part
                else:
                    yield _written(part)
        except ApiError as problem:
            self._notes.append(f"ended by an error: {problem}")
            refused = self._dialect.refused
            if self._answer is not None:
                refused = self._answer.fail
            for event in refused(problem):
                yield _written(event)

    def _decoding(self) -> str:
        fields = self._request.fields
        return self._request.served.decoding(dense=fields.dense, n_probes=fields.n_probes)


class TokenCount(Completion):
    """The response to a request for the number of a prompt's tokens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the tokens and sends their number, as an ASGI application."""
        async for _ in self.wait():
            pass
        n_tokens = len(self._jobs[0].prompt.tokens)
        self._notes[:0] = [self._request.served.name, f"{n_tokens:,} tokens counted"]
        count: dict[str, Any] = {"input_tokens": n_tokens}
        if self._dialect.count_object is not None:
            count["object"] = self._dialect.count_object
        await json_response(count)(scope, receive, send)


def _written(event: StreamEvent) -> str:
    """An event as a stream has it."""
    data = event.data
    if not isinstance(data, str):
        data = write_json(data)
    if event.name:
        return f"event: {event.name}\ndata: {data}"
    return f"data: {data}"


def speed_of(jobs: list[Job]) -> float | None:
    """Tokens per second after the first of each answer; None if there are none."""
    times = [moment for job in jobs for moment in job.times]
    seconds = max(times, default=0.0) - min(times, default=0.0)
    n_tokens = sum(max(0, len(job.tokens) - 1) for job in jobs)
    if n_tokens == 0 or seconds <= 0:
        return None
    return n_tokens / seconds


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
