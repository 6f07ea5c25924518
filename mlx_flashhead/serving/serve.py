"""The HTTP server: a port, the generating thread behind it, its log and its end."""

import errno
import logging
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import NoReturn

from ..common.command import printable
from .endpoints import ApiHandler, ApiServer
from .engine.engine import Engine
from .network.addresses import access_of
from .served_models import load_models

# A token or a chunk of a prompt is computed within this time, or the process ends without it.
END_SECONDS = 3.0


@contextmanager
def serving(flags: Namespace) -> Iterator[ApiServer]:
    """A block in which the models of the flags are served; a ValueError if they cannot be."""
    with _listen(flags.host, flags.port) as server:
        engine = Engine(lambda: load_models(flags), flags)
        try:
            server.models, server.access = engine.models.result(), access_of(flags)
            server.flags, server.engine, server.started = flags, engine, int(time.time())
            Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
            try:
                yield server
            finally:
                server.shutdown()
        finally:
            engine.close(END_SECONDS)


class _PrintableFormatter(logging.Formatter):
    # a line may hold a model's words
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def requests_logged(level: str) -> Iterator[None]:
    """Within the block, the project's log goes to standard error, from a level such as "INFO"."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    package = logging.getLogger(__name__.partition(".")[0])
    package.addHandler(handler)
    package.setLevel(level)
    # transformers warns of long prompts, which the server refuses itself
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.removeHandler(handler)


def let_signals_interrupt() -> None:
    """From now on a signal to end interrupts the main thread. A second one ends the process.

    C++ code in other threads aborts if the interpreter is finalized meanwhile. So neither the
    second signal nor :func:`leave` finalizes it.
    """
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, end)


def leave(code: int) -> NoReturn:
    """Ends the process at once, with all that was printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _listen(host: str, port: int) -> ApiServer:
    """A server that listens, and answers as soon as it serves."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        server_class = type("_Server", (ApiServer,), {"address_family": family})
        return server_class(address, ApiHandler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use: choose another --port, or 0 for any free one"
        elif isinstance(error, socket.gaierror):
            reason = "the host does not exist: check --host"
        else:
            reason = f"{(error.strerror or str(error)).lower()}: choose another --port or --host"
        raise ValueError(f"Port {port} of {host} cannot be used, {reason}.") from None
