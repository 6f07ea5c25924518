"""The server's flags: for its models, its requests, their limits and its clients."""

import argparse
import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.arguments import Parser, Type, json_object, number, one_of, share, whole_number
from ..common.flags import add_answering_options

TOKEN_FILE = Path("~/.config/mlx_flashhead/lan-token")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def size(text: str) -> int:
    """A type of argument: a number of bytes, with K, M or G for powers of 1024."""
    match = re.fullmatch(r"0*([1-9][0-9]*)([KMG]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"it is {text}: give a size such as 500K, 8M or 4G")
    return int(match[1]) << 10 * " KMG".index(match[2] or " ")


def names(text: str) -> list[str]:
    """A type of argument: names with commas between."""
    return text.split(",")


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.server``."""
    parser = Parser(
        prog="mlx_flashhead.server",
        description="Serve models with their FlashHeads: a page for browsers, and the OpenAI API.",
    )
    _add_models(parser.add_argument_group("models"))
    _add_requests(parser.add_argument_group("defaults of requests"))
    _add_limits(parser.add_argument_group("limits"))
    _add_network(parser.add_argument_group("network"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    flag, add = group.add_argument, _adder(group)
    flag("--model", required=True, help="Folder or repository of any model that mlx-lm loads.")
    more = "Another name for it, which answers carry (default: that of its folder or repository)."
    flag("--served-model-name", metavar="NAME", help=more)
    more = "Further models that requests may name. They are loaded at the start and stay in memory."
    flag("--allow-models", nargs="+", default=[], metavar="MODEL", help=more)
    probes = "Clusters scored per token, unless a request gives n_probes (default: the FlashHead's)"
    flag("--n-probes", type=whole_number(1), help=probes)
    add_answering_options(group)
    dense = "Score every token with the normal (dense) head, unless a request says otherwise."
    flag("--dense", action="store_true", help=dense)
    flag("--adapter-path", help="Folder of LoRA adapters for --model.")
    flag("--draft-model", help="A model that drafts tokens for --model.")
    draft = "Clusters scored per drafted token (default: those that read a tenth of its head)."
    flag("--draft-probes", type=whole_number(1), help=draft)
    add("--num-draft-tokens", whole_number(1, 64), 3, "Tokens drafted at once")
    flag("--trust-remote-code", action="store_true", help="Run Python code of these models.")
    flag("--chat-template", help="A chat template in place of the one of --model.")
    settings = 'Settings of the chat template, such as {"enable_thinking": false}'
    flag("--chat-template-args", type=json_object, default={}, metavar="JSON", help=settings)


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = _adder(group)
    add("--temp", number(0, 100), 0.0, "Temperature")
    add("--top-p", share, 1.0, "Draw from the likeliest tokens of this probability")
    add("--top-k", whole_number(0), 0, "Draw from so many likeliest tokens; 0 draws from all")
    add("--min-p", share, 0.0, "Draw from tokens of this share of the likeliest one's probability")
    add("--max-tokens", whole_number(1), 512, "Tokens of an answer")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    flag, add = group.add_argument, _adder(group)
    context = "Tokens of a prompt and its answer together (default: the model's limit)"
    flag("--context-size", type=whole_number(2), metavar="TOKENS", help=context)
    add("--max-body-bytes", size, "4M", "Largest body of a request, such as 500K", metavar="SIZE")
    concurrency = "Answers that are made at once; others wait"
    add("--decode-concurrency", whole_number(1, 1024), 32, concurrency)
    wait = "Verify, and send text, at least this often; 0 takes the normal head (default: fastest)"
    flag("--max-wait", type=number(0, 1), metavar="SECONDS", help=wait)
    step = "Greatest number of a prompt's tokens that are read at once; fewer if other answers wait"
    add("--prefill-step-size", whole_number(1), 2048, step)
    add("--prompt-cache-size", whole_number(0), 10, "Number of caches of earlier prompts")
    memory = "Memory for these caches, such as 4G (default: no limit)"
    flag("--prompt-cache-bytes", type=size, metavar="SIZE", help=memory)
    bits = "Quantize caches of prompts; answers then take turns instead of sharing a batch"
    flag("--kv-bits", type=one_of(2, 3, 4, 5, 6, 8), help=f"{bits} (default: none)")
    add("--kv-group-size", one_of(32, 64, 128), 64, "Group size of quantized caches")
    start = "Tokens from which a cache is quantized"
    add("--quantized-kv-start", whole_number(0), 5000, start)


def _add_network(group: argparse._ArgumentGroup) -> None:
    flag, add = group.add_argument, _adder(group)
    host = "Address to listen on; any but this machine's needs the token (default: 127.0.0.1)"
    flag("--host", help=host)
    add("--port", whole_number(0, 65535), 8080, "Port to listen on; 0 takes a free one")
    lan = "Listen on all interfaces, so that an iPad can open the page; prints the address and a "
    lan += "QR code. Every client needs the token that they carry."
    flag("--lan", action="store_true", help=lan)
    hosts = "Further names of this machine, with commas between, such as mac.fritz.box; its "
    hosts += "addresses, host name and names in .local are known."
    flag("--allowed-hosts", type=names, default=[], help=hosts)
    origins = "Origins of other sites whose scripts may use the API, such as https://chat.example"
    flag("--allowed-origins", type=names, default=[], help=f"{origins} (default: none)")
    token = "File that keeps the token from one start to the next; made with a random one"
    add("--token-file", Path, TOKEN_FILE, token)
    log = "INFO logs a line for each answer, without prompts and answers"
    add("--log-level", str, "INFO", log, choices=("DEBUG", "INFO", "WARNING", "ERROR"))


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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _adder(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """A function that adds flags with a value: (name, type, default, help, further arguments)."""

    def add(name: str, type: Type, default: Any, help: str, **further: Any) -> None:
        help += " (default: %(default)s)"
        group.add_argument(name, type=type, default=default, help=help, **further)

    return add
