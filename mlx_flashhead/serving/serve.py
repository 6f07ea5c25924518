"""The HTTP server: a port, the generating thread behind it, its log and its end."""

import asyncio
import gc
import io
import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TextIO

import uvicorn

from ..common.command import from_extra, printable
from ..common.interrupts import other_handlers
from .access import MAX_HEAD_BYTES, Access, access_of
from .connections import MAX_WAITING, Connection, FrontDoor, Waiting
from .endpoints import Api
from .engine import Engine
from .served_models import load_models

# A thread that reads a request gives way so soon to those that compute and send tokens. Python's
# own 5 ms are a large part of a token's time.
SWITCH_SECONDS = 0.0005
BACKLOG = 1024
SHUTTING_DOWN = "The server is shutting down."


class Server(uvicorn.Server):
    """uvicorn's server, with a front door and limits of connections."""

    def __init__(self, app: Any, access: Access, end_answers: Callable[[], None] = lambda: None):
        self._end_answers = end_answers
        waiting: Waiting = {}
        # Lines of uvicorn's own access log would hold tokens. With the headers of proxies any
        # client could name another address. The backlog is accepted at once, before the oldest
        # connections are aborted.
        super().__init__(
            uvicorn.Config(
                FrontDoor(app, access, waiting),
                loop="asyncio",
                http=partial(Connection, waiting),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                headers=[("Server", "mlx_flashhead"), ("Connection", "close")],
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                backlog=MAX_WAITING,
                timeout_graceful_shutdown=2,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets many connections wait: one that finds no room tries again after seconds."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the server at a signal, the process at a second one.

        Neither finalizes the interpreter, where threads of C++ abort.
        """
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self._end_answers()


def serve(flags: Namespace) -> None:
    """Serves the models of the flags until a signal.

    Raises:
        ValueError: If they cannot be served.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with listening(flags.host, flags.port) as port:
        access = access_of(flags)
        engine = Engine(lambda: load_models(flags), flags)
        try:
            # uvicorn's handlers of signals end the server in order.
            with other_handlers():
                asyncio.run(_serve(flags, engine, access, port))
        finally:
            # A token or a chunk of a prompt is computed by then.
            engine.close(3.0)


async def _serve(flags: Namespace, engine: Engine, access: Access, port: socket.socket) -> None:
    api = Api(flags, engine)
    server = Server(api.router(), access, lambda: api.end_answers(SHUTTING_DOWN))
    # nohup lets SIGHUP be ignored.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    serving = asyncio.create_task(server.serve([port]))
    loading: asyncio.Future[Any] = asyncio.wrap_future(engine.models)
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    has_loaded = loading.done() and loading.exception() is None
    # A signal may have closed the port meanwhile.
    if has_loaded and not server.should_exit:
        models = ", ".join(f"{served.name} ({served.decoding()})" for served in loading.result())
        # Modules and models stay, and looking through them for garbage would stop all threads.
        gc.collect()
        gc.freeze()
        # The address comes last, in sight.
        number = port.getsockname()[1]
        where = url(own_address(flags.host), number).rstrip("/")
        print(f"Serving {models} at {where} (Ctrl-C ends it)", flush=True)
        if access.token is not None:
            announce(flags.host, number, access.token, sys.stdout)
    else:
        server.should_exit = True
    await serving
    if loading.done():
        # It raises the error if loading has failed.
        loading.result()


def own_address(host: str) -> str:
    """The address under which others reach ``host``; 127.0.0.1 without a route to any network."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # This sends nothing. It chooses the interface for an address that is reserved for
            # documentation.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def url(host: str, port: int, token: str | None = None) -> str:
    """Returns the address of the page, with the token if there is one."""
    if ":" in host:
        host = f"[{host}]"
    page = f"http://{host}:{port}/"
    if token is None:
        return page
    return f"{page}?token={token}"


def announce(host: str, port: int, token: str, out: TextIO) -> None:
    """Prints how another device opens the page and uses the API of a server on ``host``.

    The page's part comes last, and is on the screen if that has 80 columns and 24 lines.
    """
    address = own_address(host)
    page = url(address, port, token)
    text = (
        f"Programs use {url(address, port)}v1 with the token as their API key.",
        "Whoever has the token can use the model. The connection is not encrypted.",
        "Open this on an iPad, an iPhone or any computer of the network:",
        _qr_code(page, out),
        f"  {page}",
    )
    print(*text, sep="\n", file=out, flush=True)


def _qr_code(page: str, out: TextIO) -> str:
    """The lines of a QR code of an address, or a sentence that says why there is none."""
    try:
        segno = from_extra("segno", "qr", "A QR code of this address")
    except ValueError as missing:
        return str(missing)
    code = segno.make(page, error="l", micro=False)
    # With a wide border the code of a full IPv6 address leaves no line for the text.
    border = 1
    if code.version < 5:
        border = 2
    drawn = io.StringIO()
    code.terminal(drawn, compact=True, border=border)
    lines = drawn.getvalue().splitlines()
    if out.isatty():
        # White on black: the code is for a dark terminal.
        lines = [f"\x1b[97;40m{line}\x1b[0m" for line in lines]
    text = "\n".join(lines)
    try:
        text.encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        # In ASCII the code would be too large.
        return f"A QR code of it needs a terminal with UTF-8. This one has {out.encoding}."
    return text


def log_requests(level: str) -> None:
    """Sends the project's log to standard error, from a level such as "INFO"."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    # A line may hold a model's words.
    handler.format = lambda record: printable(formatter.format(record))  # type: ignore[method-assign]
    logging.basicConfig(handlers=[handler])
    logging.getLogger(__name__.partition(".")[0]).setLevel(level)
    # They warn of what clients do, asyncio of those that have left.
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.ERROR)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Returns a socket that listens.

    Raises:
        ValueError: If the port cannot be used.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        server = socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"Port {port} of {host} cannot be used, {reason}: choose another --port or --host."
        ) from None
    with server:
        yield server
