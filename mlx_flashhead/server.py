"""Serves models: a page for browsers, and OpenAI's API."""

import os

from .common.command import command
from .serving.server_options import check_options, make_parser


@command
def main() -> None:
    """Entry point."""
    parser = make_parser()
    flags = parser.parse_args()
    check_options(parser, flags)
    from .models.fetch import resolve

    # This downloads them, or says what is wrong before seconds of imports.
    for model in (flags.model, flags.draft_model, *flags.allow_models):
        if model:
            resolve(model)
    import mlx.core as mx

    from .serving.serve import log_requests, serve

    if mx.distributed.init().size() > 1:
        parser.error("the server is one process: start it without mlx.launch")
    log_requests(flags.log_level)
    serve(flags)
    print("Stopped.", flush=True)
    # Threads of C++ abort while an interpreter is finalized.
    os._exit(0)


if __name__ == "__main__":
    main()
