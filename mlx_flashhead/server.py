"""Serves models: a page for browsers, and OpenAI's API."""

import sys
import time

from .common.command import command
from .common.processes import join_processes
from .models.fetch import resolve
from .serving.network.addresses import announce, url
from .serving.serve import leave, let_signals_interrupt, requests_logged, serving
from .serving.server_options import check_options, make_parser

LOST = 75  # EX_TEMPFAIL: a supervisor starts the server again
LOOK_SECONDS = 0.5


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.server``."""
    parser = make_parser()
    flags = parser.parse_args()
    check_options(parser, flags)
    if join_processes().size() > 1:
        parser.error("the server is one process: start it without mlx.launch")
    let_signals_interrupt()
    with requests_logged(flags.log_level):
        try:
            for model in (flags.model, flags.draft_model, *flags.allow_models):
                if model is not None:
                    resolve(model)  # downloads happen here, where Ctrl-C ends them
            with serving(flags) as server:
                dense = flags.dense or server.models[0].head is None
                how = "dense" if dense else "with FlashHead"
                port, token = server.server_port, server.access.token
                where = url(flags.host, port).rstrip("/")
                print(f"Serving {flags.model} {how} at {where} (Ctrl-C ends it)", flush=True)
                if token is not None:
                    announce(flags.host, port, token, sys.stdout)
                while server.engine.healthy:
                    time.sleep(LOOK_SECONDS)
            print("error: the thread that answers is lost: start the server again.")
            leave(LOST)
        except KeyboardInterrupt:
            print("Stopped.")
            leave(0)


if __name__ == "__main__":
    main()
