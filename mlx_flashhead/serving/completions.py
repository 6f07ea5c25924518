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
from ..version import __version__
from .answer_text import PromptProgress, Token
from .api_errors import ApiError
from .bodies import json_response, write_json
from .choices import Choice, usage_of
from .connections import MAX_ANSWERED
from .engine import Engine
from .jobs import Job, read_jobs
from .requests import Request
from .served_models import ServedModel
from .turns import Turns

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
LOADING = "The model is being loaded: try again in a moment."
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
        self._named: set[str] = set()  # fields without effect that the log has named
        self.large_bodies = Turns("receive", total=MAX_ANSWERED, each=1)
        self.parsers = Turns("parse", total=1, each=1)  # Python reads JSON alone in any case
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

    def __init__(self, service: Service, fields: dict[str, Any], http_request: HttpRequest):
        self._service = service
        self._fields = fields
        self._http_request = http_request
        self._notes: list[str] = http_request.state.notes
        self._address: str = http_request.scope["client"][0]
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Any]()
        self._jobs: list[Job] = []  # once the request has been read
        self._left = Event()  # the client has
        self._watching = asyncio.create_task(self._watch())
        service.in_progress.add(self)

    async def read(self) -> None:
        """Reads the request, whose model has been loaded; an ApiError if it is wrong."""
        service = self._service
        read = partial(
            read_jobs,
            self._fields,
            chat=self._http_request.scope["path"] in CHAT_PATHS,
            models=service.models,
            flags=service.flags,
            events=self,
            address=self._address,
        )
        has_form = any(self._fields.get(name) is not None for name in _FORMS)
        readers = service.grammar_readers if has_form else service.readers
        try:
            self._jobs = await readers.run(self._address, partial(unless_left, self._left, read))
        except LeftError:
            raise ClientDisconnect from None
        request = self._jobs[0].request
        service.name_ignored(request.ignored)
        self._request = request
        fields = request.fields
        chat = "chat.completion.chunk" if fields.stream else "chat.completion"
        self._common = {  # what all parts of an answer have beside their choices
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": chat if request.chat else "text_completion",
            "created": int(time.time()),
            "model": request.served.name,
            "system_fingerprint": f"mlx_flashhead-{__version__}",
        }
        options = fields.stream_options
        self._include_usage = fields.stream and options is not None and options.include_usage
        if self._include_usage:
            self._common["usage"] = None  # but in the last part

    def put(self, event: tuple[int, Any]) -> None:
        """Adds an event with the index of its job, from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generates the texts and sends them, as an ASGI application."""
        try:
            if self._fields.get("stream") is True:
                events = (f"{event}\n\n" async for event in self._events())
                response = StreamingResponse(
                    events, headers=_STREAM_HEADERS, media_type="text/event-stream"
                )
                await response.stream_response(send)
            else:
                async for _ in self._parts():
                    pass  # the choices keep them
                whole = await asyncio.to_thread(self._whole)
                await whole(scope, receive, send)
        finally:
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

    async def _watch(self) -> None:
        """Ends the jobs when the client has left, or has its answer."""
        while (await self._http_request.receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        for job in self._jobs:
            job.ended = True  # at once, whatever is still in the queue
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
            if service.n_waiting_bytes > _MAX_WAITING_BYTES:  # those that came before stay
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

    async def _parts(self) -> AsyncIterator[str | dict[str, Any]]:
        """What there is until all texts are complete: comments, and the choices of chunks."""
        if not self._jobs:
            async for comment in self._comments_while_loading():
                yield comment
            await self.read()
        self._service.engine.submit(self._jobs)
        self._choices = [Choice(self._request, job.index) for job in self._jobs]
        while any(choice.finish_reason is None for choice in self._choices):
            index, event = await self._queue.get()
            if isinstance(event, ApiError | ClientDisconnect):
                raise event
            if isinstance(event, BaseException):
                raise ApiError("The answer has failed: see the server's log.", status=500)
            if isinstance(event, PromptProgress):
                yield f": prompt {event.done}/{event.total}"
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
            async for part in self._parts():
                if isinstance(part, str):
                    yield part
                else:
                    yield f"data: {write_json(self._common | {'choices': [part]})}"
        except ApiError as problem:
            self._notes.append(f"ended by an error: {problem}")
            yield f"data: {write_json(problem.as_json())}"
            return
        yield f": decoding {self._decoding()}"
        if (speed := speed_of(self._jobs)) is not None:
            yield f": {speed:.2f} tokens/s"
        if self._include_usage:
            usage = {"choices": [], "usage": usage_of(self._jobs)}
            yield f"data: {write_json(self._common | usage)}"
        yield "data: [DONE]"

    def _decoding(self) -> str:
        fields = self._request.fields
        return self._request.served.decoding(dense=fields.dense, n_probes=fields.n_probes)


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
