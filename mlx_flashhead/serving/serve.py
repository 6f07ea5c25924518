"""The HTTP server: a port, and the generating thread behind it."""

import errno
import logging
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

from ..common.terminal import printable
from .catalogue import Catalogue, load_catalogue
from .endpoints import ApiHandler, Service, handler_for
from .engine.engine import Engine
from .network.access import Access
from .network.connections import LimitedServer

# A token or a chunk of a prompt is computed within this time, or the process ends without it.
END_SECONDS = 3.0


def serve(
    flags: Namespace,
    access: Callable[[], Access],
    announce: Callable[[str, Catalogue, Access], None],
    wait: Callable[[Callable[[], bool]], None],
) -> None:
    """Serves until ``wait`` returns or raises.

    Args:
        flags: The server's flags.
        access: Makes the rules once the models are loaded.
        announce: Called with the server's address when it answers.
        wait: Waits in this thread for the end, or until the function that it gets says that the
            server is not healthy.

    Raises:
        ValueError: If the port cannot be used, or a model cannot be loaded.
    """
    with _listen(flags.host, flags.port) as server:
        engine = Engine(lambda: load_catalogue(flags), flags)
        try:
            catalogue = engine.catalogue.result()
            rules = access()
            service = Service(engine, catalogue, rules, flags, int(time.time()))
            server.RequestHandlerClass = handler_for(service)
            Thread(
                target=server.serve_forever, args=(0.1,), name="connections", daemon=True
            ).start()
            announce(_url(flags.host, server.server_port), catalogue, rules)
            try:
                wait(lambda: engine.healthy)
            finally:
                server.shutdown()
        finally:
            engine.close(END_SECONDS)


class _PrintableFormatter(logging.Formatter):
    """Formats lines of the log, which may hold a model's words."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def requests_logged(level: str) -> Iterator[None]:
    """Within the block, the project's log of requests and errors goes to standard error.

    Args:
        level: Such as "INFO".
    """
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


def _listen(host: str, port: int) -> LimitedServer:
    """A server that listens, and answers once it has a handler.

    Raises:
        ValueError: If it cannot listen on this address and port.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        server_class = type("_Server", (LimitedServer,), {"address_family": family})
        return server_class(address, ApiHandler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use: choose another --port, or 0 for any free one"
        elif isinstance(error, socket.gaierror):
            reason = "the host does not exist: check --host"
        else:
            reason = f"{(error.strerror or str(error)).lower()}: choose another --port or --host"
        raise ValueError(f"Port {port} of {host} cannot be used, {reason}.") from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
