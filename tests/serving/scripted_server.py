"""A server behind the real front door whose answers a test writes: the page's counterpart."""

import asyncio
import json
import logging
from contextlib import contextmanager
from threading import Event, Thread

from starlette.requests import ClientDisconnect
from starlette.routing import Route, Router

from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.bodies import json_response
from mlx_flashhead.serving.completions import still_loading
from mlx_flashhead.serving.connections import logger, read_body
from mlx_flashhead.serving.page_files import PAGE_ROUTES
from mlx_flashhead.serving.serve import Server, listening

# The name of a machine on a network: plain http, so no secure context. The browser maps it here.
LAN_NAME = "studio.local"
TOKEN = "k7mf-3xq2-9tzc-hd4w-p8ns"
MODEL = {"name": "SmolLM2-135M-Instruct", "dense": False, "n_probes": 120}
MODEL |= {"decoding": "verified", "flash_head": "verified"}
INFO = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "models": [MODEL]}
# Tokens per second that are reported: with FlashHead, and dense.
SPEEDS = {False: 35.5, True: 25.0}
BREAK = object()


class Script(logging.Handler):
    """What the server says, and what it has seen: the requests' bodies, and lines of its log.

    ``answers`` has for each request to come the pieces of its answer: texts, an `Event` to wait
    for, a dict (a whole delta), a tuple (how many tokens of the question have been read, of how
    many), or `BREAK` (the connection ends there). A text alone is a refusal. ``left`` is set when a
    client has gone before its answer was complete.
    """

    def __init__(self):
        super().__init__()
        routes = [Route("/v1/chat/completions", self._post, methods=["POST"])]
        routes += [Route(path, self._get) for path in ("/health", "/page/info.json", "/v1/models")]
        self.server = Server(Router([*routes, *PAGE_ROUTES]), Access())
        # The pages of all tests, as they name themselves in their requests.
        self.pages = set()
        self.reset()

    def reset(self):
        """Forgets all of it."""
        self.test = f"{id(self)}-{len(self.pages)}"
        self.pages.add(self.test)
        self.access = Access()
        self.info = INFO
        self.left = Event()
        # While it is true, the model is being loaded, and nothing else is answered.
        self.loading = False
        self.answers = []
        self.requests = []
        self.log = []

    @property
    def access(self):
        """The rules, which a test may change."""
        return self.server.config.app.access

    @access.setter
    def access(self, access):
        self.server.config.app.access = access

    def emit(self, record):
        self.log.append(record.getMessage())

    async def _get(self, request):
        if self.loading and request.scope["path"] == "/page/info.json":
            raise still_loading()
        values = {"/health": {"status": "ok"}, "/page/info.json": self.info}
        return json_response(values.get(request.scope["path"], {"data": []}))

    async def _post(self, request):
        body = json.loads(await read_body(request))
        if request.headers.get("X-Test") in self.pages - {self.test}:
            # A page of the last test has left with its request on the way.
            raise ClientDisconnect
        self.requests.append(body)
        if self.loading:
            raise still_loading()
        pieces = self.answers.pop(0) if self.answers else ["Fine."]
        if isinstance(pieces, str):
            raise ApiError(pieces)
        # The next test has another event.
        left = self.left
        decoding = self._decoding(body)

        async def stream(scope, receive, send):
            answering = asyncio.create_task(_stream(pieces, decoding, send))
            leaving = asyncio.create_task(_disconnected(receive))
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                leaving.cancel()
                return await answering
            answering.cancel()
            left.set()
            raise ClientDisconnect

        return stream

    def _decoding(self, body):
        """How the model of a request is said to decode."""
        if body.get("dense"):
            return "dense: as requested"
        if "n_probes" in body:
            return "verified"
        models = self.info["models"]
        asked = [model for model in models if model["name"] == body.get("model")]
        model = asked[0] if asked else models[0]
        return model["decoding"]


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(pieces, decoding, send):
    async def write(line, more=True):
        body = f"{line}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def event(delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        await write(f"data: {json.dumps({'choices': [choice]})}")

    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    n_tokens = 0
    for piece in pieces:
        if piece is BREAK:
            return
        if isinstance(piece, Event):
            while not piece.is_set():
                await asyncio.sleep(0.01)
        elif isinstance(piece, tuple):
            await write(": prompt {}/{}".format(*piece))
        else:
            n_tokens += 1
            delta = piece if isinstance(piece, dict) else {"content": piece}
            await event(delta)
    await event({}, finish_reason="stop")
    await write(f": decoding {decoding}")
    speed = SPEEDS[decoding.startswith("dense")]
    await write(f": {speed:.2f} tokens/s")
    usage = {"prompt_tokens": 5, "completion_tokens": n_tokens}
    await write(f"data: {json.dumps({'choices': [], 'usage': usage})}")
    await write("data: [DONE]", more=False)


@contextmanager
def running(server: Server, port: int = 0):
    """Runs a server on 127.0.0.1; yields its port."""
    server.should_exit = False
    server.started = False
    with listening("127.0.0.1", port) as listener:
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def scripted_server(script: Script | None = None, port: int = 0):
    """Runs a server with a script; yields ``(port, script)``."""
    if script is None:
        script = Script()
    logger.addHandler(script)
    logger.setLevel(logging.INFO)
    with running(script.server, port) as port:
        yield port, script
    logger.removeHandler(script)
