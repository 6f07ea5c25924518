"""The server with its page: mlx-lm's API behind the front door."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.install import get_flash_head
from .access import Access
from .guard import GuardedHandler
from .handler import FlashHeadHandler
from .provider import FlashHeadProvider


class PageHandler(GuardedHandler, FlashHeadHandler):
    """Answers with the page or the API; ``cli_args`` has the `access` and the `page_info`."""

    @property
    def access(self) -> Access:
        """The server's rules."""
        return self.response_generator.cli_args.access

    def page_info(self) -> Mapping[str, Any]:
        """The default model, and the flags that are the settings' defaults."""
        return self.response_generator.cli_args.page_info

    def _set_cors_headers(self) -> None:
        # Takes the place of mlx-lm's, which allows all methods and headers whatever the origin.
        origin = self.access.cross_origin(self.headers)
        if origin is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Vary", "Origin")


def default_settings(provider: FlashHeadProvider) -> dict[str, Any]:
    """What the page shows of the default model, which has been loaded.

    A dense model has no ``n_probes`` and no ``n_clusters``.
    """
    args = provider.cli_args
    info = {
        "model": Path(args.model).name,
        "temperature": args.temp,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
    }
    head = get_flash_head(provider.model)
    if head is not None:
        info |= {"dense": args.dense, "n_probes": head.n_probes, "n_clusters": head.n_clusters}
    return info
