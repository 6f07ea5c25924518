"""The server's flags: for its models, its requests, their limits and its clients."""

import argparse
import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from typing import Any

from ..common.arguments import Parser, json_object, number, share, whole_number
from ..common.flags import (
    MAX_WAIT,
    add_answering_options,
    add_cache_flags,
    add_draft_flags,
    add_draft_probes,
    add_lookup_flag,
    check_draft_flags,
)
from ..common.suggested_model import model_is_needed

# A group's ``add_argument``.
Add = Callable[..., Any]
LOCAL = "127.0.0.1"
DEFAULT_TOKEN_FILE = Path("~/.config/mlx_flashhead/lan-token")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def size(text: str) -> int:
    """A type of argument: a number of bytes, with K, M or G for powers of 1024."""
    match = re.fullmatch(r"0*([1-9][0-9]*)([KMG]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"it is {text}: give a size such as 500K, 8M or 4G")
    return int(match[1]) << 10 * " KMG".index(match[2] or " ")


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.server``."""
    about = "Serve models: a page for browsers, and OpenAI's and Anthropic's APIs."
    parser = Parser(prog="mlx_flashhead.server", description=about)
    _add_models(parser.add_argument_group("models"))
    _add_defaults(parser.add_argument_group("defaults of requests").add_argument)
    _add_limits(parser.add_argument_group("limits").add_argument)
    _add_network(parser.add_argument_group("network").add_argument)
    return parser


def _add_models(group: Any) -> None:
    add = group.add_argument
    add("--model", help="Folder or repository of any model that mlx-lm loads.")
    add(
        "--served-model-name",
        metavar="NAME",
        help="Name of --model in answers (default: its own).",
    )
    add(
        "--allow-models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="More models, for requests that name them.",
    )
    add(
        "--any-model",
        action="store_true",
        help="Let --model answer whatever model a request names (default: only the clients of "
        "/v1/messages and /v1/responses may name any, if one model is loaded).",
    )
    add_answering_options(group)
    add(
        "--dense",
        action="store_true",
        help="Take the normal (dense) head, unless a request says otherwise.",
    )
    add("--adapter-path", help="Folder of LoRA adapters for --model.")
    add_draft_flags(add, most=64)
    add_draft_probes(add)
    add("--trust-remote-code", action="store_true", help="Run these models' own Python code.")
    add("--chat-template", help="A chat template that replaces the one of --model.")
    add(
        "--escape-control-tokens",
        action="store_true",
        help="Treat control tokens such as <|im_start|> in the text of users and tools as plain "
        "text.",
    )
    add(
        "--chat-template-args",
        type=json_object,
        default={},
        help='JSON for the chat template, such as {"enable_thinking": false}.',
    )


def _add_defaults(add: Add) -> None:
    add("--temp", type=number(0, 100), default=0.0, help="Temperature (default: %(default)s).")
    add(
        "--top-p",
        type=share,
        default=1.0,
        help="Keep the likeliest tokens that together have this probability (top-p); 1 keeps all "
        "(default: %(default)s).",
    )
    add(
        "--top-k",
        type=whole_number(0),
        default=0,
        help="Keep this many of the likeliest tokens (top-k); 0 keeps all (default: %(default)s).",
    )
    add(
        "--min-p",
        type=share,
        default=0.0,
        help="Keep tokens at least this likely relative to the best (min-p); 0 keeps all "
        "(default: %(default)s).",
    )
    add(
        "--max-tokens",
        type=whole_number(1),
        help="Longest answer in tokens, where a request names no max_tokens (default: the "
        "context).",
    )


def _add_limits(add: Add) -> None:
    add(
        "--context-size",
        type=whole_number(2),
        help="Most tokens of a prompt and its answer (default: the model's).",
    )
    add(
        "--max-body-bytes",
        type=size,
        default="4M",
        metavar="SIZE",
        help="Largest body of a request (default: %(default)s).",
    )
    add(
        "--decode-concurrency",
        type=whole_number(1, 1024),
        default=32,
        help="Answers at once; others wait, and addresses share them meanwhile "
        "(default: %(default)s).",
    )
    add(
        "--load-wait",
        type=number(0, 3600),
        default=60.0,
        metavar="SECONDS",
        help="Longest time that a request waits for a model that is being loaded "
        "(default: %(default)s).",
    )
    add(
        "--max-wait",
        type=number(0, 1),
        metavar="SECONDS",
        help="Longest time that a token waits for its verification; 0 uses the normal head "
        f"(default: {MAX_WAIT:g}).",
    )
    add_lookup_flag(add)
    add(
        "--prefill-step-size",
        type=whole_number(1),
        default=2048,
        help="Most tokens of a prompt read at once (default: %(default)s).",
    )
    add(
        "--prompt-cache-size",
        type=whole_number(0),
        default=10,
        help="Number of earlier prompts whose caches are kept, at most (default: %(default)s).",
    )
    add(
        "--prompt-cache-bytes",
        type=size,
        help="Most memory for these caches, such as 4G (default: a quarter of the machine's).",
    )
    add_cache_flags(add, "Bits of quantized caches; answers take turns (default: not quantized).")


def _add_network(add: Add) -> None:
    add(
        "--host",
        help=f"Address to listen on; others than {LOCAL} need the token (default: {LOCAL}).",
    )
    add(
        "--port",
        type=whole_number(0, 65535),
        default=8080,
        help="Port to listen on; 0 takes a free one (default: %(default)s).",
    )
    add(
        "--lan",
        action="store_true",
        help="Listen on all interfaces, for iPads; prints the address with the token.",
    )
    names = methodcaller("split", ",")
    add(
        "--allowed-hosts",
        type=names,
        default=[],
        help="More names of this machine or of its https proxy, such as "
        "mac.fritz.box,chat.example.",
    )
    add(
        "--allowed-origins",
        type=names,
        default=[],
        help="Sites whose scripts may use the API, separated by commas.",
    )
    add(
        "--token-file",
        type=Path,
        default=DEFAULT_TOKEN_FILE,
        help="File that keeps the token (default: %(default)s).",
    )
    add(
        "--log-level",
        type=str.upper,
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
        help="What is logged; INFO has a line for each answer (default: %(default)s).",
    )


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the command with a sentence if the flags contradict each other; fills in the host."""
    if not args.model:
        parser.error(model_is_needed())
    if args.dense and args.n_probes is not None:
        parser.error("--dense scores every token: leave --n-probes out")
    check_draft_flags(parser, args)
    if args.host is None:
        args.host = LOCAL
        if args.lan:
            args.host = "0.0.0.0"
    elif args.lan and is_loopback(args.host):
        parser.error(
            f"--host {args.host} is this machine alone: leave it out with --lan, or give the "
            "address of one interface"
        )
    for origin in args.allowed_origins:
        if not _ORIGIN.fullmatch(origin):
            parser.error(
                f"--allowed-origins {origin}: name each site, such as https://chat.example, "
                "without wildcards"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
