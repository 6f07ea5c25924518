"""A server behind the real front door whose answers a test writes: the page's counterpart."""

import json
import logging
from contextlib import contextmanager
from threading import Event, Thread

from mlx_flashhead.serving.network import guard
from mlx_flashhead.serving.network.access import Access
from mlx_flashhead.serving.network.connections import LimitedServer
from mlx_flashhead.serving.network.guard import GuardedHandler
from mlx_flashhead.serving.protocol.api_error import ApiError

# The name of a machine on a network: plain http, so no secure context. The browser maps it here.
LAN_NAME = "studio.local"
TOKEN = "k7mf-3xq2-9tzc-hd4w-p8ns"
MODEL = {"name": "SmolLM2-135M-Instruct", "dense": False, "n_probes": 120}
MODEL |= dict.fromkeys(("decoding", "flash_head"), "verified")
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

    def __init__(self, access: Access | None = None):
        super().__init__()
        self.reset(access)

    def reset(self, access: Access | None = None):
        """Forgets all of it."""
        self.access = access or Access()
        self.answers, self.requests, self.log = [], [], []
        self.left = Event()
        self.info = INFO

    def emit(self, record):
        self.log.append(record.getMessage())


class ScriptedServer(LimitedServer):
    """With the rules of a script, which a test may change."""

    script: Script

    @property
    def access(self):
        return self.script.access


class ScriptedHandler(GuardedHandler):
    """An API in the form of the server's."""

    server: ScriptedServer

    def get(self, path):
        told = {"/health": {"status": "ok"}, "/page/info.json": self.server.script.info}
        told["/v1/models"] = {"data": []}
        if path not in told:
            raise ApiError("nothing there", status=404)
        self.send_json(told[path])

    def post(self, path):
        script = self.server.script
        with self.server.answering(self.connection, self.client_address[0]):
            body = json.loads(self.read_body())
            script.requests.append(body)
            left = script.left  # that of this test
            pieces = script.answers.pop(0) if script.answers else ["Fine."]
            if isinstance(pieces, str):
                raise ApiError(pieces)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self._stream(pieces, self._decoding(body))
            except ConnectionError:
                left.set()
                raise

    def _decoding(self, body):
        """How an answer is decoded: n_probes forces the FlashHead on."""
        models = self.server.script.info["models"]
        model = next((m for m in models if m["name"] == body.get("model")), models[0])
        if body.get("dense"):
            return "dense: every token is scored"
        return "verified" if "n_probes" in body else model["decoding"]

    def _stream(self, pieces, decoding):
        n_tokens = 0
        for piece in pieces:
            if piece is BREAK:
                return
            if isinstance(piece, Event):
                while not piece.wait(0.02):
                    if self.client_has_gone():
                        raise ConnectionAbortedError
            elif isinstance(piece, tuple):
                self._write(": prompt {}/{}".format(*piece))
            else:
                n_tokens += 1
                self._event(piece if isinstance(piece, dict) else {"content": piece})
        self._event({}, finish_reason="stop")
        self._write(f": decoding {decoding}")
        self._write(f": {SPEEDS[decoding.startswith('dense')]:.2f} tokens/s")
        usage = {"prompt_tokens": 5, "completion_tokens": n_tokens}
        self._write(f"data: {json.dumps({'choices': [], 'usage': usage})}")
        self._write("data: [DONE]")

    def _event(self, delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self._write(f"data: {json.dumps({'choices': [choice]})}")

    def _write(self, line):
        self.wfile.write(f"{line}\n\n".encode())


@contextmanager
def scripted_server(script: Script | None = None, port: int = 0):
    """Runs a server on 127.0.0.1; yields ``(port, script)``."""
    script = script or Script()
    guard.logger.addHandler(script)
    guard.logger.setLevel(logging.INFO)
    with ScriptedServer(("127.0.0.1", port), ScriptedHandler) as server:
        server.script = script
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_port, script
        finally:
            server.shutdown()
            thread.join()
            guard.logger.removeHandler(script)
