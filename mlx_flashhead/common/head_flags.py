"""The flags that choose a model's FlashHead and its rows, which several commands share."""

import argparse
from typing import Any

from .arguments import one_of, whole_number

FINE_BITS = (6, 8, 16)


def add_head_options(group: Any) -> None:
    """Adds the flags of a command that loads a model and builds a missing FlashHead first."""
    add_probes_option(group)
    add_source_options(group)
    add_fine_head_options(group)


def add_probes_option(group: Any) -> None:
    """Adds ``--n-probes``."""
    group.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored per token (default: the number that is fastest on this machine).",
    )


def add_source_options(group: Any, no_build: str = "Refuse to build a missing FlashHead.") -> None:
    """Adds ``--flash-head`` and ``--no-build``."""
    group.add_argument(
        "--flash-head",
        metavar="FOLDER_OR_REPO",
        help="Source of the FlashHead (default: the model's folder, else the one that was built "
        "for this model before, else a new one is built once and kept).",
    )
    group.add_argument("--no-build", action="store_true", help=no_build)


def add_fine_head_options(group: Any) -> None:
    """Adds ``--fine-head`` and ``--head-bits``."""
    group.add_argument(
        "--fine-head",
        nargs="?",
        const=True,
        type=lambda text: text or True,
        metavar="SOURCE",
        help="Give a quantized model the finer output head of its original: better text, at about "
        "the same speed with FlashHead. Only the head's rows are fetched, once. SOURCE is a "
        "repository, a folder or a safetensors file (default: the original that the model names).",
    )
    group.add_argument(
        "--head-bits",
        type=one_of(*FINE_BITS),
        metavar="|".join(map(str, FINE_BITS)),
        help="Bits of the finer head; 16 keeps the original's (default: 8).",
    )


def add_answering_options(group: Any) -> None:
    """Adds the flags of a command that answers before a FlashHead is built."""
    add_source_options(group, "Build no FlashHead: without one, answer with the normal head.")
    add_fine_head_options(group)
    group.add_argument(
        "--build-first",
        action="store_true",
        help="Build a missing FlashHead before the first answer (default: the model answers with "
        "its normal head, and the FlashHead is built when there is time).",
    )
    group.add_argument(
        "--flash-head-always",
        action="store_true",
        help="Use the FlashHead even where it makes this model no faster on this machine.",
    )
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="Take the FlashHead's choices without verification (default: every token is verified "
        "with all rows, so that the text is the normal head's).",
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """``--flash-head`` and ``--no-build`` as arguments of ``load``."""
    return {"flash_head": args.flash_head, "build": not args.no_build}
