"""The server's flags: for its models, its requests, their limits and its clients."""

import argparse
import ipaddress
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.arguments import Parser, json_object, number, one_of, share, whole_number
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
    about = "Serve models with their FlashHeads: a page for browsers, and the OpenAI API."
    parser = Parser(prog="mlx_flashhead.server", description=about)

    def add(name: str, help: str, default: Any = None, **further: Any) -> None:
        help += "" if default in (None, [], {}) else " (default: %(default)s)"
        group.add_argument(name, default=default, help=help, **further)

    def switch(name: str, help: str) -> None:
        group.add_argument(name, action="store_true", help=help)

    group = parser.add_argument_group("models")
    add("--model", "Folder or repository of any model that mlx-lm loads.", required=True)
    more = "Another name for it, which answers carry (default: that of its folder or repository)."
    add("--served-model-name", more, metavar="NAME")
    more = "Further models that requests may name. They are loaded at the start and stay in memory."
    add("--allow-models", more, [], nargs="+", metavar="MODEL")
    add_answering_options(group)
    switch(
        "--dense",
        "Score every token with the normal (dense) head, unless a request says otherwise.",
    )
    add("--adapter-path", "Folder of LoRA adapters for --model.")
    add("--draft-model", "A model that drafts tokens for --model.")
    draft = "Clusters scored per drafted token (default: as many as read a tenth of its head)."
    add("--draft-probes", draft, type=whole_number(1))
    add("--num-draft-tokens", "Tokens drafted at once", 3, type=whole_number(1, 64))
    switch("--trust-remote-code", "Run Python code of these models.")
    add("--chat-template", "A chat template in place of the one of --model.")
    settings = 'Settings of the chat template, such as {"enable_thinking": false}'
    add("--chat-template-args", settings, {}, type=json_object, metavar="JSON")

    group = parser.add_argument_group("defaults of requests")
    add("--temp", "Temperature", 0.0, type=number(0, 100))
    add("--top-p", "Draw from the likeliest tokens of this probability", 1.0, type=share)
    top_k = "Draw from so many likeliest tokens; 0 draws from all"
    add("--top-k", top_k, 0, type=whole_number(0))
    min_p = "Draw from tokens of this share of the likeliest one's probability"
    add("--min-p", min_p, 0.0, type=share)
    add("--max-tokens", "Tokens of an answer", 512, type=whole_number(1))

    group = parser.add_argument_group("limits")
    context = "Tokens of a prompt and its answer together (default: the model's limit)"
    add("--context-size", context, type=whole_number(2), metavar="TOKENS")
    body = "Largest body of a request, such as 500K"
    add("--max-body-bytes", body, "4M", type=size, metavar="SIZE")
    concurrency = "Answers that are made at once; others wait"
    add("--decode-concurrency", concurrency, 32, type=whole_number(1, 1024))
    wait = "Verify, and send text, at least this often; 0 takes the normal head (default: fastest)"
    add("--max-wait", wait, type=number(0, 1), metavar="SECONDS")
    step = "Greatest number of a prompt's tokens that are read at once; fewer if other answers wait"
    add("--prefill-step-size", step, 2048, type=whole_number(1))
    caches = "Number of caches of earlier prompts"
    add("--prompt-cache-size", caches, 10, type=whole_number(0))
    memory = "Memory for these caches, such as 4G (default: no limit)"
    add("--prompt-cache-bytes", memory, type=size, metavar="SIZE")
    bits = "Quantize caches of prompts; answers then take turns instead of sharing a batch"
    add("--kv-bits", f"{bits} (default: none)", type=one_of(2, 3, 4, 5, 6, 8))
    add("--kv-group-size", "Group size of quantized caches", 64, type=one_of(32, 64, 128))
    start = "Tokens from which a cache is quantized"
    add("--quantized-kv-start", start, 5000, type=whole_number(0))

    group = parser.add_argument_group("network")
    add(
        "--host",
        "Address to listen on; any but this machine's needs the token (default: 127.0.0.1)",
    )
    add("--port", "Port to listen on; 0 takes a free one", 8080, type=whole_number(0, 65535))
    lan = "Listen on all interfaces, so that an iPad can open the page; prints the address and a "
    switch("--lan", lan + "QR code. Every client needs the token that they carry.")
    hosts = "Further names of this machine, with commas between, such as mac.fritz.box; its "
    hosts += "addresses, host name and names in .local are known."
    add("--allowed-hosts", hosts, [], type=names)
    origins = "Origins of other sites whose scripts may use the API, such as https://chat.example"
    add("--allowed-origins", f"{origins} (default: none)", [], type=names)
    token = "File that keeps the token from one start to the next; made with a random one"
    add("--token-file", token, TOKEN_FILE, type=Path)
    log = "INFO logs a line for each answer, without prompts and answers"
    add("--log-level", log, "INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
