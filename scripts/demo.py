"""Builds a real model, converts it, and shows its dense and its FlashHead form side by side.

`scripts/demo.sh` runs this in a virtual environment of the checkout. Both forms have the same
weights at the same precision. Both generate greedily through mlx-lm, in turn, so that neither slows
the other down.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import mlx_flashhead
from fetch_smollm2 import fetch_smollm2
from mlx_flashhead.cli.console import command
from mlx_flashhead.models.install import dense_copy
from side_by_side import compare

MODELS = Path("models")
DENSE_MODEL = MODELS / "SmolLM2-135M-Instruct"
FLASH_HEAD_MODEL = MODELS / "SmolLM2-135M-Instruct-FlashHead"
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
    fetch_smollm2(DENSE_MODEL)
    if FLASH_HEAD_MODEL.exists():
        console.print(f"Its FlashHead form is already there: {FLASH_HEAD_MODEL}")
    else:
        console.print("Converting it, which is done once and takes a few minutes on two cores.")
        mlx_flashhead.convert(str(DENSE_MODEL), str(FLASH_HEAD_MODEL))
    flash, tokenizer = mlx_flashhead.load(str(FLASH_HEAD_MODEL))
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
