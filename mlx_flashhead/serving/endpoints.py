"""Answers requests of OpenAI's API: in the event loop, with what the engine's thread computes."""

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from ..common.guarded import MAX_HELPERS
from .answers import Answer, address_of, disconnected
from .api_errors import ApiError
from .bodies import LARGE_BODY, fields_of, json_response, write_json
from .connections import MAX_ANSWERED, read_body
from .engine import Engine
from .jobs import read_jobs
from .page_files import PAGE_ROUTES
from .requests import find_model, unknown_model
from .served_models import ServedModel, served_names
from .turns import Turns

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
LOADING = "The model is being loaded: try again in a moment."
_TICK_SECONDS = 1.0  # between comments of a stream whose model is being loaded
_MAX_WAITING_BYTES = 32 << 20  # of the bodies that wait for a model
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold pieces back
]
_FORMS = ("response_format", "regex", "grammar", "tools")  # their grammars take long to compile
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

logger = logging.getLogger(__name__)


class Api:
    """The endpoints, with the state that all requests share."""

    def __init__(self, flags: Namespace, engine: Engine):
        self.engine = engine
        self._flags = flags
        self._started = int(time.time())
        self.end: ApiError | None = None  # why no request is answered any more
        self.answers: set[Answer] = set()  # in progress
        self.n_waiting_bytes = 0  # of the bodies that wait for a model
        self._named: set[str] = set()  # fields without effect that the log has named
        # Bodies become tokens in steps, and in each of them addresses take turns.
        self._large_bodies = Turns("receive", total=MAX_ANSWERED, each=1)
        self._parsing = Turns("parse", total=1, each=1)  # Python reads JSON alone in any case
        self._readers = Turns("read", total=MAX_HELPERS, each=2)
        self._grammar_readers = Turns("read grammar", total=6, each=2)
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
        has_form = any(fields.get(name) is not None for name in _FORMS)
        readers = self._grammar_readers if has_form else self._readers
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
    """Refuses a path of another API, and names what answers it here.

    Raises:
        ApiError: Always.
    """
    path = request.scope["path"]
    first, *_ = path.removeprefix("/v1").strip("/").split("/")
    raise ApiError(f"{path[:80]} is not served here: {_REMEDIES[first]}.", status=404)


class AnswerAfterLoading:
    """The response to a request that came before its model.

    It waits, and a stream has comments meanwhile, so that no client and no proxy gives up.
    """

    def __init__(self, api: Api, fields: dict[str, Any], request: HttpRequest):
        self._api = api
        self._fields = fields
        self._request = request
        self._n_bytes = int(request.headers["Content-Length"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Waits for the model, and answers then."""
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
            await send_text(f"data: {write_json(problem.as_json())}", more=False)

    async def _ticks(self, receive: Receive) -> AsyncIterator[str]:
        """Waits for the models, and yields a comment from time to time.

        Raises:
            ApiError: If the models do not come in time, or too much waits, or the server ends.
            ClientDisconnect: If the client leaves.
        """
        loaded = asyncio.create_task(self._loaded())
        leaving = asyncio.create_task(disconnected(receive))
        until = time.monotonic() + self._api.load_seconds
        self._api.n_waiting_bytes += self._n_bytes
        try:
            if self._api.n_waiting_bytes > _MAX_WAITING_BYTES:  # those that came before stay
                raise still_loading()
            while not loaded.done():
                left = until - time.monotonic()
                if left <= 0:
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
