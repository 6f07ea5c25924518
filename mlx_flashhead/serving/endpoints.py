"""The paths that are served: completions, the models, the server's state, and the page."""

from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router

from .api_errors import ApiError
from .bodies import LARGE_BODY, fields_of, json_response
from .choices import CHATS, TEXTS
from .completions import Completion, Service, TokenCount
from .connections import read_body
from .messages import MESSAGES
from .page_files import PAGE_ROUTES
from .responses import RESPONSES
from .served_models import find_model, served_names, unknown_model

_METHODS = ["GET", "POST", "PUT", "DELETE"]
_COMPLETIONS = {
    "/v1/chat/completions": CHATS,
    "/chat/completions": CHATS,
    "/v1/completions": TEXTS,
    "/v1/messages": MESSAGES,
    "/messages": MESSAGES,
    "/v1/responses": RESPONSES,
    "/responses": RESPONSES,
}
_COUNTS = {"/v1/messages/count_tokens": MESSAGES, "/v1/responses/input_tokens": RESPONSES}
# Paths of what others serve, and what programs that need them can do, by the first word.
_ELSEWHERE = ("/v1/responses/{rest:path}", "/v1/messages/{rest:path}", "/api/{rest:path}")
_REMEDIES = {
    "responses": "responses are not kept here, send the whole conversation to /v1/responses",
    "messages": "send each message to /v1/messages",
    "api": "Ollama's API is another one. Give the program this server's address with /v1 as an "
    "OpenAI server",
}


class Api(Service):
    """The endpoints."""

    def router(self) -> Router:
        """The paths that are served."""
        routes = [
            Route(path, self.complete, methods=["POST"]) for path in (*_COMPLETIONS, *_COUNTS)
        ]
        routes += [
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/page/info.json", self.page_info),
        ]
        routes += [Route(path, refuse_other_api, methods=_METHODS) for path in _ELSEWHERE]
        return Router(routes + PAGE_ROUTES, redirect_slashes=False)

    async def health(self, request: HttpRequest) -> Response:
        """Whether requests are answered, and how."""
        health: dict[str, Any] = {"status": self.engine.status}
        if health["status"] != "loading":
            health["decoding"] = {served.name: served.decoding() for served in self.models}
        http_status = HTTPStatus.OK
        if health["status"] != "ok":
            http_status = HTTPStatus.SERVICE_UNAVAILABLE
        return json_response(health, http_status)

    async def list_models(self, request: HttpRequest) -> Response:
        """The models that are served, also while they are being loaded."""
        return json_response({"object": "list", "data": [*map(self._model, self._names)]})

    async def show_model(self, request: HttpRequest) -> Response:
        """One of them."""
        return json_response(self._model(request.path_params["name"]))

    async def page_info(self, request: HttpRequest) -> Response:
        """What the page needs: the models, and the defaults of requests."""
        flags = self.flags
        models = []
        for served in self.models:
            model = {
                "name": served.name,
                "dense": served.settings.dense,
                "decoding": served.decoding(),
                "context": served.context,
            }
            if served.head is not None:
                # Compare shows it beside the dense head.
                model["flash_head"] = served.decoding(dense=False)
                model["n_probes"] = served.head.n_probes
            models.append(model)
        # Without max_tokens an answer may fill the context.
        return json_response(
            {
                "temperature": flags.temp,
                "top_p": flags.top_p,
                "max_tokens": flags.max_tokens,
                "models": models,
            }
        )

    async def complete(self, request: HttpRequest) -> Completion:
        """Answers a chat, continues texts, or counts the tokens of a prompt."""
        address = request.scope["client"][0]
        path = request.scope["path"]
        turn: AbstractAsyncContextManager[None] = nullcontext()
        if int(request.headers["Content-Length"]) > LARGE_BODY:
            turn = self.large_bodies.turn(address)
        async with turn:
            body = await read_body(request)
            fields = await self.parsers.run(address, partial(fields_of, body))
            if self.end is not None:
                raise self.end
            if path in _COUNTS:
                completion: Completion = TokenCount(self, _COUNTS[path], fields, request)
            else:
                completion = Completion(self, _COMPLETIONS[path], fields, request)
            if self.engine.models.done():
                await completion.read()
        return completion

    @property
    def _names(self) -> list[str]:
        """The names of all models, the default's first."""
        if self.end is None and not self.engine.models.done():
            by_model = served_names(self.flags)
        else:
            by_model = [served.names for served in self.models]
        return [name for names in by_model for name in names]

    def _model(self, name: str) -> dict[str, Any]:
        """A model in OpenAI's form, with its state."""
        if name not in self._names:
            raise unknown_model(self._names)
        model = {"id": name, "object": "model", "status": self.engine.status}
        if self.engine.models.done():
            model["decoding"] = find_model(self.models, name).decoding()
        return {**model, "created": self.started, "owned_by": "mlx_flashhead"}


async def refuse_other_api(request: HttpRequest) -> Response:
    """Refuses a path of another API, and names what answers it here.

    Raises:
        ApiError: Always, but for a path that takes another method.
        HTTPException: For such a path.
    """
    path = request.scope["path"]
    if path in _COUNTS:
        raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "POST"})
    first, *_ = path.removeprefix("/v1").strip("/").split("/")
    raise ApiError(f"{path[:80]} is not served here: {_REMEDIES[first]}.", status=404)
