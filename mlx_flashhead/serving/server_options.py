"""The server's flags: for its models, its requests, their limits and its clients."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.arguments import Parser, Type, json_object, number, one_of, share, whole_number
from ..common.head_flags import add_answering_options
from .network.addresses import TOKEN_FILE, is_loopback

_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.server``."""
    parser = Parser(
        prog="mlx_flashhead.server",
        description="Serve models with their FlashHeads: a page for browsers, and the OpenAI API.",
    )

    group = parser.add_argument_group("models")
    add = _adder(group)
    model = "Folder or Hugging Face repository of any model that mlx-lm loads."
    group.add_argument("--model", required=True, help=model)
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="Another name for it, which answers carry. Its own name is that of its folder or "
        "repository.",
    )
    group.add_argument(
        "--allow-models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="Further models that requests may name. They are loaded at the start and stay in "
        "memory.",
    )
    group.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored per token, unless a request gives its own n_probes (default: the "
        "number that the FlashHead names).",
    )
    add_answering_options(group)
    dense = "Score every token, unless a request says otherwise: the dense model."
    group.add_argument("--dense", action="store_true", help=dense)
    group.add_argument("--adapter-path", help="Folder of LoRA adapters for --model.")
    group.add_argument("--draft-model", help="A model that drafts tokens for --model.")
    group.add_argument(
        "--draft-probes",
        type=whole_number(1),
        help="Clusters scored for each drafted token (default: as many as read a "
        "tenth of its head's bytes).",
    )
    add("--num-draft-tokens", whole_number(1, 64), 3, "Tokens drafted at once")
    own_code = "Allow these models' own Python code."
    group.add_argument("--trust-remote-code", action="store_true", help=own_code)
    group.add_argument("--chat-template", help="A chat template in place of --model's own.")
    settings = 'Settings of the chat template, such as {"enable_thinking": false}'
    group.add_argument(
        "--chat-template-args", type=json_object, default={}, metavar="JSON", help=settings
    )

    group = parser.add_argument_group("defaults of requests")
    add = _adder(group)
    add("--temp", number(0, 100), 0.0, "Temperature")
    add("--top-p", share, 1.0, "Draw from the likeliest tokens of this probability")
    add(
        "--top-k", whole_number(0), 0, "Draw from this number of likeliest tokens; 0 draws from all"
    )
    add("--min-p", share, 0.0, "Draw from tokens of this share of the likeliest one's probability")
    add("--max-tokens", whole_number(1), 512, "Tokens of an answer")

    group = parser.add_argument_group("limits")
    add = _adder(group)
    group.add_argument(
        "--context-size",
        type=whole_number(2),
        metavar="TOKENS",
        help="Tokens of a prompt and its answer together; longer prompts are refused (default: the "
        "model's own limit)",
    )
    add("--max-body-bytes", size, "4M", "Largest body of a request, such as 500K", metavar="SIZE")
    concurrency = "Answers that are made at once; others wait"
    add("--decode-concurrency", whole_number(1, 1024), 32, concurrency)
    group.add_argument(
        "--max-wait",
        type=number(0, 1),
        metavar="SECONDS",
        help="Verify, and send text, at least every so many seconds; 0 verifies every token at "
        "once (default: as is fastest on this machine)",
    )
    step = "Greatest number of a prompt's tokens that are read at once; fewer if other answers wait"
    add("--prefill-step-size", whole_number(1), 2048, step)
    add("--prompt-cache-size", whole_number(0), 10, "Caches of earlier prompts that are kept")
    memory = "Memory for these caches, such as 4G (default: no limit)"
    group.add_argument("--prompt-cache-bytes", type=size, metavar="SIZE", help=memory)
    group.add_argument(
        "--kv-bits",
        type=one_of(2, 3, 4, 5, 6, 8),
        help="Quantize caches of prompts to this number of bits; answers then take turns instead "
        "of sharing a batch (default: none)",
    )
    add("--kv-group-size", one_of(32, 64, 128), 64, "Group size of quantized caches")
    start = "Tokens from which a cache is quantized"
    add("--quantized-kv-start", whole_number(0), 5000, start)

    group = parser.add_argument_group("network")
    add = _adder(group)
    group.add_argument(
        "--host",
        help="Address to listen on (default: 127.0.0.1, this machine alone). With any other one "
        "clients need the token, as with --lan.",
    )
    add("--port", whole_number(0, 65535), 8080, "Port to listen on; 0 takes a free one")
    group.add_argument(
        "--lan",
        action="store_true",
        help="Listen on all interfaces, so that an iPad can open the page; prints the address and "
        "a QR code. Every client needs the token that they carry.",
    )
    group.add_argument(
        "--allowed-hosts",
        type=lambda text: text.split(","),
        default=[],
        help="Further names of this machine, with commas between, such as mac.fritz.box; its "
        "addresses, host name and names in .local are known.",
    )
    group.add_argument(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default=[],
        help="Origins of other sites whose scripts may use the API, with commas between, such as "
        "https://chat.example (default: none)",
    )
    kept = "File that keeps the token from one start to the next; made with a random one"
    add("--token-file", Path, TOKEN_FILE, kept)
    log = "INFO logs a line for each request, without prompts and answers"
    add("--log-level", str, "INFO", log, choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the command with a sentence if the flags contradict each other; fills in the host."""
    if args.dense and args.n_probes is not None:
        parser.error("--dense scores every token: leave --n-probes out")
    if args.draft_probes is not None and args.draft_model is None:
        parser.error("--draft-probes are a draft model's: add --draft-model, or leave it out")
    if args.host is None:
        args.host = "0.0.0.0" if args.lan else "127.0.0.1"
    elif args.lan and is_loopback(args.host):
        remedy = "leave it out with --lan, or give the address of one interface"
        parser.error(f"--host {args.host} is this machine alone: {remedy}")
    for origin in args.allowed_origins:
        if not _ORIGIN.fullmatch(origin):
            how = "name each site, such as https://chat.example, without wildcards"
            parser.error(f"--allowed-origins {origin}: {how}")


def size(text: str) -> int:
    """A type of argument: a number of bytes, with K, M or G for powers of 1024."""
    match = re.fullmatch(r"0*([1-9][0-9]*)([KMG]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"it is {text}: give a size such as 500K, 8M or 4G")
    return int(match[1]) << 10 * " KMG".index(match[2] or " ")


def _adder(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """A function that adds flags with a value: (name, type, default, help, further arguments)."""

    def add(name: str, type: Type, default: Any, help: str, **further: Any) -> None:
        help += " (default: %(default)s)"
        group.add_argument(name, type=type, default=default, help=help, **further)

    return add
