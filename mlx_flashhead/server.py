"""Serves models: a page for browsers, and OpenAI's API."""

import argparse
import sys
from functools import partial
from urllib.parse import urlsplit

from .common.command import command
from .common.processes import join_processes
from .models.fetch import resolve
from .serving.catalogue import Catalogue
from .serving.network.access import Access
from .serving.network.addresses import announce as announce_on_network
from .serving.network.network_options import access_of, check_network_options
from .serving.network.shutdown import Shutdown
from .serving.options import make_parser
from .serving.serve import requests_logged, serve

LOST = 75  # EX_TEMPFAIL: a supervisor starts the server again


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.server``."""
    parser = make_parser()
    flags = parser.parse_args()
    if flags.dense and flags.n_probes is not None:
        parser.error("--dense scores every token: leave --n-probes out")
    if flags.draft_probes is not None and flags.draft_model is None:
        parser.error("--draft-probes are a draft model's: add --draft-model, or leave it out")
    check_network_options(parser, flags)
    if join_processes().size() > 1:
        parser.error("the server is one process: start it without mlx.launch")
    with Shutdown() as ending, requests_logged(flags.log_level):
        try:
            for model in (flags.model, flags.draft_model, *flags.allow_models):
                if model is not None:
                    resolve(model)  # downloads happen here, where Ctrl-C ends them
            serve(flags, partial(access_of, flags), partial(_announce, flags), ending.wait)
            print("error: the thread that answers is lost: start the server again.")
            ending.leave(LOST)
        except KeyboardInterrupt:
            print("Stopped.")
            ending.leave(0)


def _announce(flags: argparse.Namespace, url: str, catalogue: Catalogue, access: Access) -> None:
    dense = flags.dense or catalogue.default.head is None
    how = "dense" if dense else "with FlashHead"
    print(f"Serving {flags.model} {how} at {url} (Ctrl-C ends it)", flush=True)
    if access.token is not None:
        port = urlsplit(url).port or flags.port
        announce_on_network(flags.host, port, access.token, sys.stdout)


if __name__ == "__main__":
    main()
