"""The server's flags for its address, its clients and its log."""

import argparse
import re
from pathlib import Path

from ...common.arguments import whole_number
from .access import Access
from .addresses import TOKEN_FILE, is_loopback, kept_token, own_names

_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_ALL_INTERFACES = "0.0.0.0"


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--host",
        help="Address to listen on (default: 127.0.0.1, this machine alone). With any other one "
        "clients need the token, as with --lan.",
    )
    group.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=8080,
        help="Port to listen on; 0 takes a free one (default: %(default)s)",
    )
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
    group.add_argument(
        "--token-file",
        type=Path,
        default=TOKEN_FILE,
        help="File that keeps the token from one start to the next; made with a random one "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--log-level",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
        help="INFO logs a line for each request, without prompts and answers "
        "(default: %(default)s)",
    )


def check_network_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command with a sentence if the flags contradict each other; fills in the host."""
    if args.host is None:
        args.host = _ALL_INTERFACES if args.lan else "127.0.0.1"
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


def access_of(args: argparse.Namespace) -> Access:
    """The rules that the flags set.

    Raises:
        ValueError: If the token file does not hold a token.
    """
    named = frozenset(name.strip().lower().rstrip(".") for name in args.allowed_hosts)
    origins = frozenset(args.allowed_origins)
    if is_loopback(args.host):
        return Access(hosts=named, origins=origins, max_body_bytes=args.max_body_bytes)
    token = kept_token(args.token_file)
    hosts = named | own_names() | {args.host.lower()}
    return Access(token, hosts, origins, args.max_body_bytes)
