"""What ``mlx_flashhead.benchmark`` takes on the command line."""

import argparse

from ..common.arguments import Parser, whole_number, whole_numbers
from ..conversion.options import IndexOptions
from ..conversion.quantization import HEAD_BITS
from ..loading.look_up import add_look_up_options
from . import estimate
from .draft import PROBES
from .head import SHAPES
from .model import SAMPLERS
from .positions import COUNTS
from .server import CLIENTS

DTYPES = ("float32", "float16", "bfloat16")
HEAD, POSITIONS, MODEL, CONVERT = "head", "positions", "model", "convert"
FIRST_USE = "first-use"
SAMPLER, DRAFT, ESTIMATE = "sampler", "draft", "estimate"
HOST, MEMORY, SERVER = "host", "memory", "server"
ANY_MODEL = "Folder or repository of any model that mlx-lm loads."


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(prog="mlx_flashhead.benchmark", description=description)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    _add_head(kinds)
    _add_positions(kinds)
    _add_model(kinds)
    _add_convert(kinds)
    _add_first_use(kinds)
    _add_sampler(kinds)
    _add_draft(kinds)
    _add_host(kinds)
    _add_memory(kinds)
    _add_server(kinds)
    estimate.add_parser(kinds)
    return parser


def _add_head(kinds) -> None:
    parser = kinds.add_parser(
        HEAD,
        help="time a head",
        description="Time a head alone: dense, and FlashHead to candidates, a token, full logits.",
    )
    _add_which_head(parser)
    _add_number(parser, "--positions", 1, "Hidden states at once")
    _add_common(parser, rounds=20)


def _add_positions(kinds) -> None:
    parser = kinds.add_parser(
        POSITIONS,
        help="time a head against the number of positions at once",
        description="Time full logits of more and more hidden states at once, dense and with "
        "FlashHead, and print the number from which dense is faster: the head's max_positions.",
    )
    _add_which_head(parser)
    parser.add_argument(
        "--positions",
        type=whole_number(1),
        action="append",
        dest="counts",
        help="Hidden states at once; may be given several times "
        f"(default: {', '.join(map(str, COUNTS))}).",
    )
    _add_common(parser, rounds=7)


def _add_host(kinds) -> None:
    parser = kinds.add_parser(
        HOST,
        help="time what the host does for a token",
        description="Time the host's part of a token: MLX's own graph, and what FlashHead adds. "
        "The Metal kernels are recorded, not run, so that any machine can measure it.",
    )
    _add_which_head(parser)
    _add_common(parser, rounds=20)


def _add_memory(kinds) -> None:
    parser = kinds.add_parser(
        MEMORY,
        help="measure the peak of memory while a model is loaded",
        description="Measure the peak of memory while a model is loaded, dense and with FlashHead.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape",
        type=_shape,
        metavar="NAME|V,D",
        help="Random heads of this shape, in float32, bfloat16 and 4 bits.",
    )
    what.add_argument("--model", help="Folder or repository of a FlashHead checkpoint.")
    _add_common(parser, rounds=None)


def _add_server(kinds) -> None:
    parser = kinds.add_parser(
        SERVER,
        help="put servers under load",
        description="Put three servers of one model under load, in turns: with FlashHead, dense, "
        "and mlx-lm's own. Clients stream answers to prompts of different lengths, and some hang "
        "up.",
    )
    _add_any_model(parser)
    parser.add_argument(
        "--clients",
        type=whole_numbers(1),
        default=CLIENTS,
        metavar="1,4,…",
        help=f"Numbers of clients at once (default: {','.join(map(str, CLIENTS))}).",
    )
    _add_number(parser, "--requests", 16, "Requests to a server for each number of clients")
    _add_number(parser, "--tokens", 16, "Tokens of each answer")
    _add_common(parser, rounds=1)


def _add_any_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=ANY_MODEL)
    add_look_up_options(parser)
    parser.add_argument(
        "--n-probes", type=whole_number(1), help="Clusters scored (default: the model's own)."
    )


def _add_or_model(what, parser: argparse.ArgumentParser) -> None:
    """A model in the place of random weights, which ``what`` offers."""
    what.add_argument("--model", help=ANY_MODEL)
    add_look_up_options(parser)
    parser.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored (default: 256, or the model's own).",
    )


def _add_number(
    parser: argparse.ArgumentParser, flag: str, default: int, text: str, *, least: int = 1
) -> None:
    parser.add_argument(
        flag, type=whole_number(least), default=default, help=f"{text} (default: %(default)s)."
    )


def _add_which_head(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="NAME|V,D",
        help=f"Random weights of the shape {', '.join(SHAPES)} or V,D; may be given several times.",
    )
    _add_or_model(what, parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of random weights.")
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=HEAD_BITS,
        default=16,
        help="Bits of random rows; 16 leaves them in --dtype (default: %(default)s).",
    )


def _add_model(kinds) -> None:
    parser = kinds.add_parser(
        MODEL,
        help="time a model's decoding",
        description="Time decoding through mlx-lm: dense, with FlashHead, and without any head.",
    )
    _add_any_model(parser)
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        action="append",
        help="May be given several times (default: all).",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        action="append",
        help="Sequences at once; may be given several times (default: 1, 4 and 8).",
    )
    _add_number(parser, "--tokens", 20, "Steps of a run")
    _add_common(parser, rounds=12)


def _add_convert(kinds) -> None:
    parser = kinds.add_parser(
        CONVERT,
        help="time a conversion",
        description="Time each stage of a conversion, into a temporary folder.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="Folder or repository of the model to convert.")
    what.add_argument(
        "--shape",
        type=_shape,
        metavar="NAME|V,D",
        help="A random head and random states instead: all stages but the model's.",
    )
    _add_number(
        parser,
        "--calibration-positions",
        IndexOptions.calibration_positions,
        "Positions to calibrate on",
    )
    _add_common(parser, rounds=None)


def _add_first_use(kinds) -> None:
    parser = kinds.add_parser(
        FIRST_USE,
        help="time the first token of a model's first use",
        description="Time each stage up to the first token of a model that is used for the first "
        "time, and of its second use. Nothing that is kept for other uses is touched.",
    )
    parser.add_argument(
        "--model", required=True, help="Folder or repository of a model without a FlashHead."
    )
    _add_common(parser, rounds=None)


def _add_sampler(kinds) -> None:
    parser = kinds.add_parser(
        SAMPLER,
        help="time samplers",
        description="Time sampling from logits alone: mlx-lm's samplers and this package's.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--vocab-size",
        type=whole_number(1),
        action="append",
        help="Of random clusters; may be given several times (default: 128256).",
    )
    _add_or_model(what, parser)
    _add_number(parser, "--positions", 1, "Positions at once")
    _add_common(parser, rounds=20)


def _add_draft(kinds) -> None:
    parser = kinds.add_parser(
        DRAFT,
        help="time speculative decoding",
        description="Time decoding without a draft, with a dense draft and with a draft's "
        "FlashHead, and count the accepted drafts.",
    )
    parser.add_argument("--model", required=True, help=ANY_MODEL)
    parser.add_argument(
        "--draft-model", required=True, help="Folder or repository of a smaller model that drafts."
    )
    parser.add_argument(
        "--probes",
        type=whole_numbers(1),
        default=PROBES,
        metavar="16,32,…",
        help=f"Clusters that the draft scores (default: {','.join(map(str, PROBES))}).",
    )
    _add_number(parser, "--num-draft-tokens", 3, "Tokens drafted at once")
    _add_number(parser, "--tokens", 40, "Tokens of each answer", least=2)
    _add_common(parser, rounds=3)


def _add_common(parser: argparse.ArgumentParser, rounds: int | None) -> None:
    if rounds is not None:
        _add_number(parser, "--rounds", rounds, "Runs that count, all forms in turns")
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
    parser.add_argument("--plot", metavar="OUT.png", help="Draw the figures into a picture.")
    parser.add_argument(
        "--report", action="store_true", help="Print the figures as JSON, to be sent as an issue."
    )


def _shape(text: str) -> tuple[str, tuple[int, int]]:
    """ "qwen3-0.6b" or "151936,1024" → its name and (V, D)."""
    if text.lower() in SHAPES:
        return text.lower(), SHAPES[text.lower()]
    parts = text.split(",")
    if len(parts) == 2 and all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        return text, (int(parts[0]), int(parts[1]))
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a shape: give {', '.join(SHAPES)}, or V,D such as 32000,512"
    )
