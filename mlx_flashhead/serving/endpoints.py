"""Answers requests of OpenAI's API: in the event loop, with what the engine's thread computes."""

import asyncio
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..common.guarded import MAX_HELPERS
from ..models.tool_calls import read_tool_calls
from ..version import __version__
from .api_errors import ApiError
from .bodies import LARGE_BODY, fields_of, has_grammar
from .connections import MAX_ANSWERED, read_body
from .engine import Engine
from .jobs import Job, Progress, Token, TokenLogprobs, read_jobs
from .page_files import PAGE_ROUTES
from .requests import Request, find_model, unknown_model
from .served_models import ServedModel, served_names
from .strict_json import dumps, json_response
from .turns import Turns

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
LOADING = "The model is being loaded: try again in a moment."
_TICK_SECONDS = 1.0  # between comments of a stream whose model is being loaded
_MAX_WAITING_BYTES = 32 << 20  # of the bodies that wait for a model
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
]
_METHODS = ["GET", "POST", "PUT", "DELETE"]
# Paths of APIs that others serve, and what programs that need them can do, by the first word.
OTHER_APIS = (
    "/v1/responses",
    "/v1/responses/{rest:path}",
    "/v1/messages",
    "/v1/messages/{rest:path}",
    "/responses",
    "/messages",
    "/api/{rest:path}",
)
_UNDER_RUN = "start a server that has it under `mlx_flashhead.run`"
_REMEDIES = {
    "responses": f"{_UNDER_RUN}, such as vllm-mlx, mlx-openai-server or oMLX (see docs/server.md)",
    "messages": f"{_UNDER_RUN}, such as vllm-mlx or oMLX (see docs/server.md)",
    "api": "Ollama's API is another one. Give the program this server's address with /v1 as an "
    f"OpenAI server, or {_UNDER_RUN} (see docs/server.md)",
}
# Fields without effect that the log names: of any number, which clients choose.
_MAX_FIELDS_NAMED = 100
_MAX_FIELD_NAME = 40  # characters
_BYTES = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}

logger = logging.getLogger(__name__)


class Api:
    """The endpoints, with the state that all requests share."""

    def __init__(self, flags: Namespace, engine: Engine):
        self.engine, self._flags, self._started = engine, flags, int(time.time())
        self.end: ApiError | None = None  # why no request is answered any more
        self.answers: set[Answer] = set()  # in progress
        self.n_waiting_bytes = 0  # of the bodies that wait for a model
        self._named: set[str] = set()  # fields without effect that the log has named
        # Bodies become tokens in steps, and in each of them addresses take turns.
        self._large_bodies = Turns("receive", total=MAX_ANSWERED, each=1)
        self._parsing = Turns("parse", total=1, each=1)  # Python reads JSON alone in any case
        self._readers = Turns("read", total=MAX_HELPERS, each=2)
        self._grammar_readers = Turns("read grammar", total=4, each=1)
        self.call_readers = Turns("read calls", total=4, each=1)

    def router(self) -> Router:
        """The paths that are served."""
        posts = (*CHAT_PATHS, "/v1/completions")
        routes = [Route(path, self.complete, methods=["POST"]) for path in posts]
        routes += [
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/page/info.json", self.page_info),
        ]
        routes += [Route(path, refuse_other_api, methods=_METHODS) for path in OTHER_APIS]
        return Router(routes + PAGE_ROUTES, redirect_slashes=False)

    def end_answers(self, message: str) -> None:
        """Ends the answers in progress, and those to come, with an error."""
        self.end = ApiError(message, status=503)
        for answer in list(self.answers):
            answer.put((0, self.end))

    async def health(self, request: HttpRequest) -> Response:
        """Whether requests are answered, and how."""
        status = self.engine.status
        value: dict[str, Any] = {"status": status}
        if status != "loading":
            value["decoding"] = {served.name: served.decoding() for served in self._models}
        return json_response(value, 200 if status == "ok" else 503)

    async def list_models(self, request: HttpRequest) -> Response:
        """The models that are served, also while they are being loaded."""
        return json_response({"object": "list", "data": [*map(self._model, self._names)]})

    async def show_model(self, request: HttpRequest) -> Response:
        """One of them."""
        return json_response(self._model(request.path_params["name"]))

    async def page_info(self, request: HttpRequest) -> Response:
        """What the page needs: the models, and the defaults of requests."""
        flags = self._flags
        models = []
        for served in self._models:
            model = {
                "name": served.name,
                "dense": served.dense,
                "decoding": served.decoding(),
                "context": served.context,
            }
            if served.head is not None:
                model["flash_head"] = served.decoding(dense=False)  # Compare's other side
                model["n_probes"] = served.head.n_probes
            models.append(model)
        info = {
            "temperature": flags.temp,
            "top_p": flags.top_p,
            "max_tokens": flags.max_tokens,  # null: an answer may fill the context
            "models": models,
        }
        return json_response(info)

    async def complete(self, request: HttpRequest) -> "Answer | AnswerAfterLoading":
        """Answers a chat, or continues texts."""
        if self.end is not None:
            raise self.end
        if int(request.headers["Content-Length"]) <= LARGE_BODY:
            return await self._complete(request)
        async with self._large_bodies.place(address_of(request)):
            return await self._complete(request)

    async def _complete(self, request: HttpRequest) -> "Answer | AnswerAfterLoading":
        body = await read_body(request)
        fields = await self._parsing.run(address_of(request), partial(fields_of, body))
        if not self.engine.models.done():
            return AnswerAfterLoading(self, fields, request)
        return await self.answer(fields, request)

    async def answer(self, fields: dict[str, Any], request: HttpRequest) -> "Answer":
        """The answer to a request of these fields, whose models have been loaded."""
        read = partial(
            read_jobs,
            fields,
            chat=request.scope["path"] in CHAT_PATHS,
            models=self._models,
            flags=self._flags,
        )
        readers = self._grammar_readers if has_grammar(fields) else self._readers
        async with readers.place(address_of(request)):
            if await request.is_disconnected():
                raise ClientDisconnect
            jobs = await readers.work(read)
        self._name_ignored(jobs[0].request.ignored)
        return Answer(self, jobs, request)

    def _name_ignored(self, fields: list[str]) -> None:
        """Names fields of a request that have no effect, each once, in the log."""
        new = {field[:_MAX_FIELD_NAME] for field in fields} - self._named
        listed = sorted(new)[: _MAX_FIELDS_NAMED - len(self._named)]
        if listed:
            self._named |= set(listed)
            names = ", ".join(ascii(field)[1:-1] for field in listed)
            logger.info("Fields without effect here, named once: %s", names)

    @property
    def load_seconds(self) -> float:
        """How long a request waits for its model."""
        return self._flags.load_wait

    @property
    def _models(self) -> list[ServedModel]:
        """The models, the default first; an ApiError while there are none."""
        if self.end is not None:
            raise self.end
        loaded = self.engine.models
        if not loaded.done():
            raise still_loading()
        if loaded.exception() is not None:
            raise ApiError("The model cannot be loaded: see the server's log.", status=503)
        return loaded.result()

    @property
    def _names(self) -> list[str]:
        """The names of all models, the default's first."""
        if self.end is None and not self.engine.models.done():
            by_model = served_names(self._flags)
        else:
            by_model = [served.names for served in self._models]
        return [name for names in by_model for name in names]

    def _model(self, name: str) -> dict[str, Any]:
        """A model in OpenAI's form, with its state."""
        if name not in self._names:
            raise unknown_model(self._names)
        model = {"id": name, "object": "model", "status": self.engine.status}
        if self.engine.models.done():
            model["decoding"] = find_model(self._models, name).decoding()
        return {**model, "created": self._started, "owned_by": "mlx_flashhead"}


def still_loading() -> ApiError:
    """The error while the models are being loaded, whose code the page knows."""
    return ApiError(LOADING, status=503, code="model_loading")


async def refuse_other_api(request: HttpRequest) -> Response:
    """Names what answers a path of another API."""
    path = request.scope["path"]
    first, *_ = path.removeprefix("/v1").strip("/").split("/")
    raise ApiError(f"{path[:80]} is not served here: {_REMEDIES[first]}.", status=404)


class AnswerAfterLoading:
    """The response to a request that came before its model: it waits, and a stream has comments
    meanwhile, so that no client and no proxy gives up."""

    def __init__(self, api: Api, fields: dict[str, Any], request: HttpRequest):
        self._api = api
        self._fields = fields
        self._request = request
        self._n_bytes = int(request.headers["Content-Length"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._fields.get("stream") is not True:
            async for _ in self._ticks(receive):
                pass
            answer = await self._api.answer(self._fields, self._request)
            await answer(scope, receive, send)
            return

        async def send_rest(message: Message) -> None:
            if message["type"] != "http.response.start":  # which has been sent
                await send(message)

        async def send_text(text: str, more: bool = True) -> None:
            body = f"{text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            async for comment in self._ticks(receive):
                await send_text(comment)
            answer = await self._api.answer(self._fields, self._request)
            await answer(scope, receive, send_rest)
        except ApiError as problem:
            self._request.state.notes.append(f"ended by an error: {problem}")
            await send_text(f"data: {dumps(problem.as_json())}", more=False)

    async def _ticks(self, receive: Receive) -> AsyncIterator[str]:
        """Waits for the models, and yields a comment from time to time.

        Raises:
            ApiError: If the models do not come in time, or too much waits, or the server ends.
            ClientDisconnect: If the client leaves.
        """
        loaded = asyncio.create_task(self._loaded())
        leaving = asyncio.create_task(_disconnected(receive))
        until = time.monotonic() + self._api.load_seconds
        self._api.n_waiting_bytes += self._n_bytes
        try:
            while not loaded.done():
                left = until - time.monotonic()
                if left <= 0 or self._api.n_waiting_bytes > _MAX_WAITING_BYTES:
                    raise still_loading()
                yield ": loading"
                await asyncio.wait(
                    {loaded, leaving},
                    timeout=min(_TICK_SECONDS, left),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if leaving.done():
                    raise ClientDisconnect
                if self._api.end is not None:
                    raise self._api.end
        finally:
            self._api.n_waiting_bytes -= self._n_bytes
            leaving.cancel()
            loaded.cancel()

    async def _loaded(self) -> None:
        """Returns when the models have been loaded, or cannot be."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(done.set)

        self._api.engine.models.add_done_callback(tell)
        await done.wait()


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def address_of(request: HttpRequest) -> str:
    """The address of a request's client."""
    return request.scope["client"][0]


class Answer:
    """The response to a request for texts, whole or in server-sent events. Its queue has, in order,
    events of the engine, a client that leaves, the end."""

    def __init__(self, api: Api, jobs: list[Job], http_request: HttpRequest):
        self.jobs, self._api, self._request = jobs, api, jobs[0].request
        self._notes: list[str] = http_request.state.notes
        self._address = address_of(http_request)
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
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
        await _disconnected(receive)
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
                if not self._request.tools:
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
                    yield f"data: {dumps(head | {'choices': [part]})}"
        except ApiError as problem:
            self._notes.append(f"ended by an error: {problem}")
            yield f"data: {dumps(problem.as_json())}"
            return
        yield f": decoding {self._decoding()}"
        if (speed := speed_of(self.jobs)) is not None:
            yield f": {speed:.2f} tokens/s"
        if self._request.include_usage:
            yield f"data: {dumps(self._common | {'choices': [], 'usage': self._usage()})}"
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


class Choice:
    """One of a request's answers in OpenAI's form, up to its latest token."""

    def __init__(self, request: Request, index: int):
        self._request, self._index = request, index
        self.finish_reason: str | None = None
        self._first_delta: dict[str, Any] = {"role": "assistant", "content": ""}
        self._whole = Token()  # with the calls as they are sent
        self._logprobs: list[TokenLogprobs] = []
        self._offset = 0  # characters of the text before the next token

    def add(self, token: Token) -> dict[str, Any] | None:
        """Adds a token: the choice of a chunk, or None if there is nothing to send."""
        content, calls, n_before = token.content, token.calls, len(self._whole.calls)
        self._whole.add(token)
        entries = [] if token.logprobs is None else [token.logprobs]
        self._logprobs += entries
        self.finish_reason = token.finish_reason
        if token.finish_reason == "stop" and self._whole.calls:
            self.finish_reason = "tool_calls"
        if not (content or token.reasoning or calls or entries or self.finish_reason):
            return None
        choice = self._choice(entries)
        if not self._request.chat:
            return choice | {"text": content}
        delta, self._first_delta = self._first_delta, {}
        numbered = [{"index": i, **call} for i, call in enumerate(calls, n_before)]
        added = {"content": content, "reasoning": token.reasoning, "tool_calls": numbered}
        return choice | {"delta": delta | {name: part for name, part in added.items() if part}}

    def whole(self) -> dict[str, Any]:
        self._offset = 0
        choice, whole = self._choice(self._logprobs), self._whole
        if not self._request.chat:
            return choice | {"text": whole.content}
        content = whole.content or (None if whole.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if whole.reasoning:
            message["reasoning"] = whole.reasoning
        return choice | {"message": message | ({"tool_calls": whole.calls} if whole.calls else {})}

    def _choice(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        tokenizer = self._request.served.tokenizer
        logprobs: dict[str, Any] | None = None
        if self._request.logprobs is not None and self._request.chat:

            def named(token: int, logprob: float) -> dict[str, Any]:
                content = token_bytes(tokenizer, token)
                text = content.decode("utf-8", "replace")
                return {"token": text, "logprob": logprob, "bytes": list(content)}

            chat = [
                named(*chosen) | {"top_logprobs": [named(*top) for top in tops]}
                for chosen, *tops in entries
            ]
            logprobs = {"content": chat, "refusal": None}
        elif self._request.logprobs is not None:
            text_of = partial(token_text, tokenizer)
            texts = [text_of(token) for (token, _), *_ in entries]
            *offsets, self._offset = accumulate(map(len, texts), initial=self._offset)
            logprobs = {
                "tokens": texts,
                "token_logprobs": [logprob for (_, logprob), *_ in entries],
                "top_logprobs": [{text_of(i): lp for i, lp in tops} for _, *tops in entries],
                "text_offset": offsets,
            }
        return {"index": self._index, "logprobs": logprobs, "finish_reason": self.finish_reason}


def read_calls(request: Request, text: str) -> list[dict[str, Any]]:
    """The calls in a text that is marked as one, in OpenAI's form; ValueError if it is none."""
    calls = []
    for call in read_tool_calls(request.served.tokenizer, text, request.tools):
        try:
            function = {"name": call["name"], "arguments": dumps(call["arguments"])}
            number = call.get("id") or f"call_{uuid.uuid4().hex}"
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The parser's call lacks a part: {error!r}") from None
        calls.append({"id": number, "type": "function", "function": function})
    return calls


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token's text, possibly incomplete characters."""
    name = tokenizer.convert_ids_to_tokens(token) or ""  # a row of the head may have no token
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        return b"".join(_BYTES.get(letter) or letter.encode() for letter in name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # as in sentencepiece
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text; for bytes that are not a text, OpenAI's name for them."""
    content = token_bytes(tokenizer, token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
