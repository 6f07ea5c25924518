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

MODELS = Path("models")
DENSE_MODEL = MODELS / "SmolLM2-135M-Instruct"
PROMPT = "Why is the sky blue? Explain it to a child."


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=100, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs (default: %(default)s)")
    args = parser.parse_args()
    if args.max_tokens < 2 or args.runs < 1:
        parser.error("--max-tokens must be 2 or more, and --runs 1 or more")
    if not args.prompt.strip():
        parser.error("--prompt is empty: ask something")

    console = Console()
    fetch("smollm2", DENSE_MODEL)
    # its FlashHead is built at the first use, and found where it is kept at the second
    flash, tokenizer = mlx_flashhead.load(str(DENSE_MODEL))
    compare(
        dense_copy(flash),
        flash,
        tokenizer,
        args.prompt,
        max_tokens=args.max_tokens,
        runs=args.runs,
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
