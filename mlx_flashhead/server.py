"""Serves models: ``mlx_lm.server`` with a FlashHead, all its flags, a page and more."""

import argparse
import signal
import sys
from types import SimpleNamespace
from urllib.parse import urlsplit

from huggingface_hub import CacheNotFound, scan_cache_dir

from .cli.console import command
from .models.compat import replaced, server_module
from .models.install import get_flash_head
from .models.load import resolve
from .models.sampling import make_sampler
from .serving.access_options import access_of, add_access_flags, check_access
from .serving.http import serve
from .serving.lan import announce as announce_on_network
from .serving.page_handler import PageHandler, default_settings
from .serving.provider import FlashHeadProvider, canonical


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.server``."""
    # a terminated server ends as an interrupted one does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parsers = SimpleNamespace(ArgumentParser=_Parser)
    names = {"argparse": parsers, "ModelProvider": FlashHeadProvider, "run": _run}
    try:
        with replaced(server_module, scan_cache_dir=_cached, **names):
            server_module.main()
    except KeyboardInterrupt:
        print("Stopped.")


class _Parser(argparse.ArgumentParser):
    """mlx-lm's parser, which its main program fills with flags, extended."""

    def parse_args(self):
        self.prog = "mlx_flashhead.server"
        self.description = "Serve FlashHead checkpoints: a page for browsers, and the OpenAI API."
        self.set_defaults(log_level="WARNING")
        for action in self._actions:
            if action.dest == "model":
                action.help = "Folder or Hugging Face repository of a FlashHead checkpoint."
            if action.dest == "log_level":
                action.help = "Set the logging level (default: WARNING)"
        group = self.add_argument_group("FlashHead")
        group.add_argument(
            "--n-probes",
            type=int,
            help="Clusters scored per token, unless a request gives its own n_probes (default: "
            "the number chosen at conversion).",
        )
        group.add_argument(
            "--dense",
            action="store_true",
            help="Score every token, unless a request says otherwise: the dense model.",
        )
        add_access_flags(self)
        args = super().parse_args()
        self._check(args)
        return _fetched(args)

    def _check(self, args):
        if args.model is None:
            self.error("--model is needed: the folder or repository of a FlashHead checkpoint")
        if not 0 <= args.port <= 65535:
            self.error(f"--port is {args.port}: it must be 0 to 65535")
        if args.max_tokens < 1:
            self.error(f"--max-tokens is {args.max_tokens}: it must be 1 or more")
        if args.dense and args.n_probes is not None:
            self.error("--dense scores every token: leave --n-probes out")
        check_access(self, args)


def _fetched(args):
    """The flags with the local names of models, which are fetched here, where Ctrl-C ends it."""
    for name in ("model", "draft_model"):
        value = getattr(args, name)
        if value is not None:
            resolve(value)
            setattr(args, name, canonical(value))
    return args


def _cached():
    """What the Hugging Face cache holds; where there is no cache, nothing."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return SimpleNamespace(repos=())


def _run(host: str, port: int, provider: FlashHeadProvider) -> None:
    """Takes the place of mlx-lm's function that its main program ends with."""
    args = provider.cli_args

    def announce(url):
        args.access = access_of(args)
        args.page_info = default_settings(provider)
        dense = args.dense or get_flash_head(provider.model) is None
        how = "dense" if dense else "with FlashHead"
        print(f"Serving {args.model} {how} at {url} (Ctrl-C ends it)", flush=True)
        if args.access.token is not None:
            announce_on_network(host, urlsplit(url).port, args.access.token, sys.stdout)

    def sampler_of_request(*arguments, **named):
        return make_sampler(*arguments, **named, model=provider.model)

    with replaced(server_module, make_sampler=sampler_of_request):
        serve(host, port, provider, handler_class=PageHandler, announce=announce)


if __name__ == "__main__":
    main()
