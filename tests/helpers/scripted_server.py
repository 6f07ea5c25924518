"""A server behind the real front door whose answers a test writes: the page's counterpart."""

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from mlx_flashhead.serving.network import guard
from mlx_flashhead.serving.network.access import Access
from mlx_flashhead.serving.network.connections import LimitedServer
from mlx_flashhead.serving.network.guard import GuardedHandler
from mlx_flashhead.serving.protocol.errors import Problem

# The name of a machine on a network: plain http, so no secure context. The browser maps it here.
LAN_NAME = "studio.local"
MODEL = {
    "name": "SmolLM2-135M-Instruct",
    "dense": False,
    "n_probes": 120,
    "n_clusters": 3072,
}
INFO = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "models": [MODEL]}
# Tokens per second that are reported: with FlashHead, and dense.
SPEEDS = {False: 35.5, True: 25.0}


@dataclass(frozen=True)
class Read:
    """A part of the question has been read."""

    done: int
    total: int


class Script:
    """What the server says.

    Attributes:
        answers: For each request to come, the pieces of its answer: texts, an `Event` to wait for,
            a dict (a whole delta), a `Read`, or `BREAK` (the connection ends there).
        requests: The bodies that came.
        seen: (method, path, headers) of all requests.
        left: Set as soon as a client has gone before its answer was complete.
        access: The rules.
        info: What the page is told about the server.
        log: Lines of the server's log.
    """

    def __init__(self, access: Access):
        self.answers = []
        self.requests = []
        self.seen = []
        self.left = Event()
        self.access = access
        self.info = INFO
        self.log = []


BREAK = object()


class ScriptedHandler(GuardedHandler):
    """An API in the form of the server's."""

    script: Script

    @property
    def access(self):
        return self.script.access  # a test may change it

    def page_info(self):
        return self.script.info

    def healthy(self):
        return True

    def health_info(self):
        return {}

    def get(self, path):
        self.script.seen.append(("GET", path, self.headers))
        if path != "/v1/models":
            raise Problem("nothing there", status=404)
        self.send_json({"data": []})

    def post(self, path):
        with self.server.answering(self.connection, self.client_address[0]):
            self._post(path)

    def _post(self, path):
        body = json.loads(self.read_body(int(self.headers["Content-Length"])))
        self.script.seen.append(("POST", path, self.headers))
        self.script.requests.append(body)
        pieces = self.script.answers.pop(0) if self.script.answers else ["Fine."]
        if isinstance(pieces, str):
            raise Problem(pieces)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(pieces, SPEEDS[bool(body.get("dense"))])
        except ConnectionError:
            self.script.left.set()
            raise

    def _stream(self, pieces, speed):
        n_tokens = 0
        for piece in pieces:
            if piece is BREAK:
                return
            if isinstance(piece, Event):
                while not piece.wait(0.02):
                    if self.client_has_gone():
                        raise ConnectionAbortedError
                continue
            if isinstance(piece, Read):
                self._write(f": prompt {piece.done}/{piece.total}\n\n".encode())
                continue
            n_tokens += 1
            self._event(piece if isinstance(piece, dict) else {"content": piece})
        self._event({}, finish_reason="stop")
        self._write(f": {speed:.2f} tokens/s\n\n".encode())
        usage = {"prompt_tokens": 5, "completion_tokens": n_tokens}
        self._write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        self._write(b"data: [DONE]\n\n")

    def _event(self, delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self._write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())

    def _write(self, data):
        self.wfile.write(data)
        self.wfile.flush()


class _Log(logging.Handler):
    """Collects the server's lines."""

    def __init__(self, lines):
        super().__init__()
        self._lines = lines

    def emit(self, record):
        self._lines.append(record.getMessage())


@contextmanager
def scripted_server(access: Access = Access(), *, script: Script | None = None, port: int = 0):  # noqa: B008
    """Runs a server on 127.0.0.1; yields ``(port, script)``."""
    script = script or Script(access)
    handler = type("Handler", (ScriptedHandler,), {"script": script})
    log = _Log(script.log)
    guard.logger.addHandler(log)
    guard.logger.setLevel(logging.INFO)
    with LimitedServer(("127.0.0.1", port), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_port, script
        finally:
            server.shutdown()
            thread.join()
            guard.logger.removeHandler(log)
