"""The HTTP server: mlx-lm's generator of responses behind a port."""

import errno
import os
import socket
from collections.abc import Callable
from functools import partial

from ..models.compat import get_system_fingerprint, replaced, server_module
from .cache import PromptCaches
from .generator import FlashHeadGenerator
from .guard import BoundedServer
from .handler import FlashHeadHandler
from .provider import FlashHeadProvider
from .valid_json import STRICT_JSON


def serve(
    host: str,
    port: int,
    provider: FlashHeadProvider,
    *,
    handler_class: type[FlashHeadHandler] = FlashHeadHandler,
    announce: Callable[[str], None],
) -> None:
    """Serves until it is interrupted.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        provider: Of the models.
        handler_class: Answers the requests.
        announce: Called with the server's URL once the default model is loaded.

    Raises:
        ValueError: If the port cannot be had, or the default model cannot be loaded.
    """
    with _listen(host, port) as server, replaced(server_module, json=STRICT_JSON):
        prompt_cache = PromptCaches(provider.cli_args.prompt_cache_size)
        generator = FlashHeadGenerator(provider, prompt_cache)
        try:
            provider.ready.result()
            server.RequestHandlerClass = partial(
                handler_class, generator, system_fingerprint=get_system_fingerprint()
            )
            announce(_url(host, server.server_port))
            server.serve_forever()
        finally:
            generator.stop_and_join()


def _listen(host: str, port: int) -> BoundedServer:
    """A server that listens, and answers once it has a handler.

    Raises:
        ValueError: If it cannot listen there.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        server_class = type("_Server", (BoundedServer,), {"address_family": family})
        return server_class(address, FlashHeadHandler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use: choose another --port, or 0 for any free one"
        elif isinstance(error, socket.gaierror):
            reason = "there is no such host: check --host"
        else:
            reason = f"{os.strerror(error.errno).lower()}: choose another --port or --host"
        raise ValueError(f"Port {port} of {host} cannot be had, {reason}.") from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
