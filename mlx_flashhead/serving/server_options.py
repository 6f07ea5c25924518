"""The server's flags: for its models, its requests, their limits and its clients."""

import argparse
import ipaddress
import re
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from typing import Any

from ..common.arguments import Parser, json_object, number, one_of, share, whole_number
from ..common.flags import MAX_WAIT, add_answering_options

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
    about = "Serve models: a page for browsers, and the OpenAI API."
    parser = Parser(prog="mlx_flashhead.server", description=about)
    _add_models(_Group(parser, "models"))
    _add_defaults(_Group(parser, "defaults of requests"))
    _add_limits(_Group(parser, "limits"))
    _add_network(_Group(parser, "network"))
    return parser


class _Group:
    """Flags under one title of --help."""

    def __init__(self, parser: Parser, title: str):
        self.group = parser.add_argument_group(title)

    def add(self, name: str, help: str, default: Any = None, **further: Any) -> None:
        """Adds a flag with a value; its default is told where it has one."""
        if default not in (None, [], {}):
            help += " (default: %(default)s)"
        self.group.add_argument(name, default=default, help=f"{help.rstrip('.')}.", **further)

    def switch(self, name: str, help: str) -> None:
        """Adds a flag without a value."""
        self.group.add_argument(name, action="store_true", help=help)


def _add_models(flags: _Group) -> None:
    flags.add("--model", "Folder or repository of any model that mlx-lm loads.")
    flags.add(
        "--served-model-name", "Name of --model in answers (default: its own).", metavar="NAME"
    )
    flags.add(
        "--allow-models", "More models, for requests that name them", [], nargs="+", metavar="MODEL"
    )
    add_answering_options(flags.group)
    flags.switch("--dense", "Take the normal (dense) head, unless a request says otherwise.")
    flags.add("--adapter-path", "Folder of LoRA adapters for --model.")
    flags.add("--draft-model", "A model that drafts tokens for --model.")
    drafts = "Clusters scored for each drafted token (default: a tenth of its head, in bytes)."
    flags.add("--draft-probes", drafts, type=whole_number(1))
    flags.add("--num-draft-tokens", "Tokens drafted at once", 3, type=whole_number(1, 64))
    flags.switch("--trust-remote-code", "Run these models' own Python code.")
    flags.add("--chat-template", "A chat template that replaces the one of --model.")
    escape = (
        "Treat control tokens such as <|im_start|> in the text of users and tools as plain text."
    )
    flags.switch("--escape-control-tokens", escape)
    flags.add(
        "--chat-template-args",
        'JSON for the chat template, such as {"enable_thinking": false}',
        {},
        type=json_object,
    )


def _add_defaults(flags: _Group) -> None:
    flags.add("--temp", "Temperature", 0.0, type=number(0, 100))
    likeliest = "Keep the likeliest tokens that together have this probability (top-p); 1 keeps all"
    flags.add("--top-p", likeliest, 1.0, type=share)
    most = "Keep this many of the likeliest tokens (top-k); 0 keeps all"
    flags.add("--top-k", most, 0, type=whole_number(0))
    relative = "Keep tokens at least this likely relative to the best (min-p); 0 keeps all"
    flags.add("--min-p", relative, 0.0, type=share)
    longest = (
        "Longest answer in tokens, where a request names no max_tokens (default: the context)."
    )
    flags.add("--max-tokens", longest, type=whole_number(1))


def _add_limits(flags: _Group) -> None:
    flags.add(
        "--context-size",
        "Most tokens of a prompt and its answer (default: the model's).",
        type=whole_number(2),
    )
    flags.add("--max-body-bytes", "Largest body of a request", "4M", type=size, metavar="SIZE")
    flags.add(
        "--decode-concurrency", "Answers at once; others wait", 32, type=whole_number(1, 1024)
    )
    wait = "Longest time that a request waits for a model that is being loaded"
    flags.add("--load-wait", wait, 60.0, type=number(0, 3600), metavar="SECONDS")
    wait = "Longest time that a token waits for its verification; 0 uses the normal head"
    flags.add(
        "--max-wait", f"{wait} (default: {MAX_WAIT:g}).", type=number(0, 1), metavar="SECONDS"
    )
    flags.add(
        "--prefill-step-size", "Most tokens of a prompt read at once", 2048, type=whole_number(1)
    )
    flags.add(
        "--prompt-cache-size",
        "Number of earlier prompts whose caches are kept, at most",
        10,
        type=whole_number(0),
    )
    flags.add(
        "--prompt-cache-bytes",
        "Most memory for these caches, such as 4G (default: no limit).",
        type=size,
    )
    flags.add(
        "--kv-bits",
        "Bits of quantized caches; answers take turns (default: not quantized).",
        type=one_of(2, 3, 4, 5, 6, 8),
    )
    flags.add("--kv-group-size", "Group size of quantized caches", 64, type=one_of(32, 64, 128))
    flags.add(
        "--quantized-kv-start", "First token whose cache is quantized", 5000, type=whole_number(0)
    )


def _add_network(flags: _Group) -> None:
    flags.add(
        "--host", f"Address to listen on; others than {LOCAL} need the token (default: {LOCAL})"
    )
    flags.add("--port", "Port to listen on; 0 takes a free one", 8080, type=whole_number(0, 65535))
    flags.switch("--lan", "Listen on all interfaces, for iPads; prints the address with the token.")
    names = methodcaller("split", ",")
    hosts = "More names of this machine or of its https proxy, such as mac.fritz.box,chat.example"
    flags.add("--allowed-hosts", hosts, [], type=names)
    flags.add(
        "--allowed-origins",
        "Sites whose scripts may use the API, separated by commas",
        [],
        type=names,
    )
    flags.add("--token-file", "File that keeps the token", DEFAULT_TOKEN_FILE, type=Path)
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    flags.add(
        "--log-level",
        "What is logged; INFO has a line for each answer",
        "INFO",
        choices=levels,
        type=str.upper,
    )


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the command with a sentence if the flags contradict each other; fills in the host."""
    if not args.model:
        parser.error("--model is needed: give a folder or a repository of a model")
    if args.dense and args.n_probes is not None:
        parser.error("--dense scores every token: leave --n-probes out")
    if args.draft_probes is not None and args.draft_model is None:
        parser.error("--draft-probes is for a draft model: add --draft-model, or leave it out")
    if args.host is None:
        args.host = "0.0.0.0" if args.lan else LOCAL
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
