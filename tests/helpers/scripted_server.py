"""A server behind the real front door whose answers a test writes: the page's counterpart."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from threading import Event, Thread

from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.guard import BoundedServer, GuardedHandler

# The name of a machine on a network: plain http, so no secure context. The browser maps it here.
LAN_NAME = "studio.local"
INFO = {
    "model": "SmolLM2-135M-Instruct",
    "temperature": 0.0,
    "top_p": 1.0,
    "max_tokens": 512,
    "n_probes": 120,
    "n_clusters": 3072,
}


class Script:
    """What the server says.

    Attributes:
        answers: For each request to come, the pieces of its answer: texts, an `Event` to wait for,
            a dict (a whole delta), or `BREAK` (the connection ends there).
        requests: The bodies that came.
        seen: (method, path, headers) of all requests.
        left: Set as soon as a client has gone before its answer was complete.
        access: The rules.
        log: Lines of the server's log.
    """

    def __init__(self, access: Access):
        self.answers = []
        self.requests = []
        self.seen = []
        self.left = Event()
        self.access = access
        self.log = []


BREAK = object()


class ScriptedAPI(BaseHTTPRequestHandler):
    """An API in the form of mlx-lm's."""

    script: Script

    def log_message(self, format, *args):
        self.script.log.append(format % args)

    def do_GET(self):
        self.script.seen.append(("GET", self.path, self.headers))
        self._answer(200 if self.path == "/v1/models" else 404, {"data": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.seen.append(("POST", self.path, self.headers))
        self.script.requests.append(body)
        pieces = self.script.answers.pop(0) if self.script.answers else ["Fine."]
        if isinstance(pieces, str):
            self._answer(400, {"error": pieces})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(pieces)
        except ConnectionError:
            self.script.left.set()
            raise

    def _stream(self, pieces):
        n_tokens = 0
        for piece in pieces:
            if piece is BREAK:
                return
            if isinstance(piece, Event):
                while not piece.wait(0.02):
                    self._write(b": keepalive\n\n")
                continue
            n_tokens += 1
            self._event(piece if isinstance(piece, dict) else {"content": piece})
        self._event({}, finish_reason="stop")
        usage = {"prompt_tokens": 5, "completion_tokens": n_tokens}
        self._write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        self._write(b"data: [DONE]\n\n")

    def _event(self, delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self._write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())

    def _write(self, data):
        self.wfile.write(data)
        self.wfile.flush()

    def _answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def scripted_server(access: Access = Access(), *, script: Script | None = None, port: int = 0):  # noqa: B008
    """Runs a server on 127.0.0.1; yields ``(port, script)``."""
    script = script or Script(access)

    class Handler(GuardedHandler, ScriptedAPI):
        access = property(lambda self: script.access)  # a test may change it

        def page_info(self):
            return INFO

    Handler.script = script
    with BoundedServer(("127.0.0.1", port), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_port, script
        finally:
            server.shutdown()
            thread.join()
