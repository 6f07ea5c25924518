"""Builds a real model and its FlashHead, and shows the dense and the FlashHead form side by side.

`scripts/demo.sh` runs this in a virtual environment of the checkout. Both forms have the same
weights at the same precision. Both generate greedily through mlx-lm, in turn, so that neither slows
the other down.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import mlx_flashhead
from fetch_model import fetch
from mlx_flashhead.common.command import command
from mlx_flashhead.models.install import dense_copy
from side_by_side import compare

MODELS = {  # name of scripts/fetch_model.py → folder, prompt
    "gemma3": (
        Path("models/Gemma-3-270M"),
        "The keeper of the lighthouse had never seen such a storm.",
    ),
    "smollm2": (Path("models/SmolLM2-135M-Instruct"), "Why is the sky blue?"),
}


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="gemma3",
        help="Gemma-3-270M goes on with a text; SmolLM2-135M, a smaller download, answers "
        "(default: %(default)s)",
    )
    parser.add_argument("--prompt", help="what to ask, or the beginning of a text")
    parser.add_argument(
        "--max-tokens", type=int, default=100, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs (default: %(default)s)")
    args = parser.parse_args()
    if args.max_tokens < 2 or args.runs < 1:
        parser.error("--max-tokens must be 2 or more, and --runs 1 or more")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: ask something")

    console = Console()
    folder, prompt = MODELS[args.model]
    fetch(args.model, folder)
    # its FlashHead is built at the first use, and found where it is kept at the second
    flash, tokenizer = mlx_flashhead.load(str(folder))
    compare(
        dense_copy(flash),
        flash,
        tokenizer,
        args.prompt or prompt,
        max_tokens=args.max_tokens,
        runs=args.runs,
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
