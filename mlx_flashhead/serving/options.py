"""The server's parser, with the flags for its models, its requests and their limits."""

import argparse

from ..common.arguments import Parser, json_object, number, one_of, share, whole_number
from ..loading.look_up import add_answering_options
from .network.network_options import add_network_options


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.server``."""
    parser = Parser(
        prog="mlx_flashhead.server",
        description="Serve models with their FlashHeads: a page for browsers, and the OpenAI API.",
    )
    _add_models(parser)
    _add_defaults(parser)
    _add_limits(parser)
    add_network_options(parser)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        required=True,
        help="Folder or Hugging Face repository of any model that mlx-lm loads.",
    )
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
    group.add_argument(
        "--dense",
        action="store_true",
        help="Score every token, unless a request says otherwise: the dense model.",
    )
    group.add_argument("--adapter-path", help="Folder of LoRA adapters for --model.")
    group.add_argument("--draft-model", help="A model that drafts tokens for --model.")
    group.add_argument(
        "--draft-probes",
        type=whole_number(1),
        help="Clusters scored for each drafted token (default: about the fewest that keep "
        "99 %% of the accepted ones).",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=whole_number(1, 64),
        default=3,
        help="Tokens drafted at once (default: %(default)s)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Allow these models' own Python code.",
    )
    group.add_argument("--chat-template", help="A chat template in place of --model's own.")
    group.add_argument(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='Settings of the chat template, such as {"enable_thinking": false}',
    )


def _add_defaults(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("defaults of requests")
    group.add_argument(
        "--temp", type=number(0, 100), default=0.0, help="Temperature (default: %(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=share,
        default=1.0,
        help="Draw from the likeliest tokens of this probability (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=whole_number(0),
        default=0,
        help="Draw from this number of likeliest tokens; 0 draws from all (default: %(default)s)",
    )
    group.add_argument(
        "--min-p",
        type=share,
        default=0.0,
        help="Draw from tokens of this share of the likeliest one's probability "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=whole_number(1),
        default=512,
        help="Tokens of an answer (default: %(default)s)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--context-size",
        type=whole_number(2),
        metavar="TOKENS",
        help="Tokens of a prompt and its answer together; longer prompts are refused (default: the "
        "model's own limit)",
    )
    group.add_argument(
        "--max-body-bytes",
        type=size,
        default=4 << 20,
        metavar="SIZE",
        help="Largest body of a request, such as 500K or 8M (default: 4M)",
    )
    group.add_argument(
        "--decode-concurrency",
        type=whole_number(1, 1024),
        default=32,
        help="Answers that are made at once; others wait (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-step-size",
        type=whole_number(1),
        default=2048,
        help="Greatest number of a prompt's tokens that are read at once; fewer if other answers "
        "wait (default: %(default)s)",
    )
    group.add_argument(
        "--prompt-cache-size",
        type=whole_number(0),
        default=10,
        help="Caches of earlier prompts that are kept (default: %(default)s)",
    )
    group.add_argument(
        "--prompt-cache-bytes",
        type=size,
        metavar="SIZE",
        help="Memory for these caches, such as 4G (default: no limit)",
    )
    group.add_argument(
        "--kv-bits",
        type=one_of(2, 3, 4, 5, 6, 8),
        help="Quantize caches of prompts to this number of bits; answers then take turns instead "
        "of sharing a batch (default: none)",
    )
    group.add_argument(
        "--kv-group-size",
        type=one_of(32, 64, 128),
        default=64,
        help="Group size of quantized caches (default: %(default)s)",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=whole_number(0),
        default=5000,
        help="Tokens from which a cache is quantized (default: %(default)s)",
    )


def size(text: str) -> int:
    """A type of argument: a number of bytes, with K, M or G for powers of 1024."""
    digits, unit = text.strip().upper().removesuffix("B"), 0
    if digits[-1:] in ("K", "M", "G"):
        digits, unit = digits[:-1], "KMG".index(digits[-1]) + 1
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"it is {text}: give a size such as 500K, 8M or 4G")
    return int(digits) << (10 * unit)
