"""The paths that are served: completions, the models, the server's state, and the page."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router

from .api_errors import ApiError
from .bodies import LARGE_BODY, fields_of, json_response
from .completions import CHAT_PATHS, Completion, Service
from .connections import read_body
from .page_files import PAGE_ROUTES
from .requests import find_model, unknown_model
from .served_models import served_names

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


class Api(Service):
    """The endpoints."""

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

    async def health(self, request: HttpRequest) -> Response:
        """Whether requests are answered, and how."""
        status = self.engine.status
        value: dict[str, Any] = {"status": status}
        if status != "loading":
            value["decoding"] = {served.name: served.decoding() for served in self.models}
        return json_response(value, 200 if status == "ok" else 503)

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
                model["flash_head"] = served.decoding(dense=False)  # Compare's other side
                model["n_probes"] = served.head.n_probes
            models.append(model)
        return json_response(
            {
                "temperature": flags.temp,
                "top_p": flags.top_p,
                "max_tokens": flags.max_tokens,  # null: an answer may fill the context
                "models": models,
            }
        )

    async def complete(self, request: HttpRequest) -> Completion:
        """Answers a chat, or continues texts."""
        address = request.scope["client"][0]
        is_large = int(request.headers["Content-Length"]) > LARGE_BODY
        async with self.large_bodies.turn(address) if is_large else nullcontext():
            body = await read_body(request)
            fields = await self.parsers.run(address, partial(fields_of, body))
            if self.end is not None:
                raise self.end
            completion = Completion(self, fields, request)
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
        ApiError: Always.
    """
    path = request.scope["path"]
    first, *_ = path.removeprefix("/v1").strip("/").split("/")
    raise ApiError(f"{path[:80]} is not served here: {_REMEDIES[first]}.", status=404)
