"""Generates with a FlashHead model on both paths, Metal and plain MLX, and compares the tokens.

    python scripts/compare_paths.py --model FOLDER [--max-tokens 40] [--prompt TEXT …]

Ends with 1 if the tokens differ by more than a tie, and prints the place and the logits that
decided. In a tie two logits differ by rounding alone, and the paths may choose differently.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

if __name__ == "__main__":
    # The script works uninstalled, too.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mlx_flashhead import get_flash_head, load, stream_generate
from mlx_flashhead.common.command import command
from mlx_flashhead.head.backend import BACKEND_VARIABLE

PATHS = ("metal", "mlx")
PROMPTS = (
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The three largest cities of France are",
    "Q: Why is the sky blue?\nA:",
)
# A logit may differ by so much: float32 sums in another order, or two steps of a coarser dtype.
SUMMATION = 1e-5


def compare(folder: str, prompts: Sequence[str] = PROMPTS, max_tokens: int = 40) -> bool:
    """Generates on both paths, and prints a line for each prompt.

    Args:
        folder: A model with a FlashHead.
        prompts: What the texts begin with.
        max_tokens: The longest text.

    Returns:
        Whether the paths agree on all prompts.

    Raises:
        ValueError: If the model cannot be loaded, or its head does not run on one of the paths.
    """
    answers = []
    for path in PATHS:
        with mock.patch.dict(os.environ, {BACKEND_VARIABLE: path}):
            model, tokenizer = load(folder)
            taken = get_flash_head(model).backend
            if taken != path:
                raise ValueError(f"The head runs on the path {taken!r} instead of {path!r}.")
            answers.append([answer(model, tokenizer, prompt, max_tokens) for prompt in prompts])
    agree = True
    for prompt, first, second in zip(prompts, *answers, strict=True):
        pairs = list(zip(first, second, strict=False))
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        longest = max(len(first), len(second))
        line = f"{prompt!r}: {same} of {longest} tokens are the same"
        if first != second:
            with get_flash_head(model).settings(dense=True):
                context = mx.array([[*tokenizer.encode(prompt), *first[:same]]])
                tie, difference = verdict(model(context)[0, -1], pairs[same])
            agree &= tie
            line += f", then {difference}"
        print(f"{line}.")
    return agree


def answer(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> list[int]:
    """FlashHead's own tokens, which no verification corrects."""
    responses = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, verify=False)
    return [response.token for response in responses]


def verdict(logits: mx.array, pair: tuple[int, int]) -> tuple[bool, str]:
    """Compares two tokens.

    Args:
        logits: Dense logits (V,).
        pair: The tokens, one of each path.

    Returns:
        Whether they are a tie, and their difference in words.
    """
    first, second = (logits[token].item() for token in pair)
    rounding = max(SUMMATION, 2 * mx.finfo(logits.dtype).eps) * max(abs(first), abs(second))
    tie = abs(first - second) <= rounding
    chosen = f"{PATHS[0]} takes token {pair[0]} and {PATHS[1]} token {pair[1]}"
    logits_of = f"dense logits {first:.6f} and {second:.6f}"
    kind = "no tie"
    if tie:
        kind = "a tie"
    return tie, f"{chosen}, {logits_of}: {kind}"


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Folder of a FlashHead checkpoint.")
    parser.add_argument("--max-tokens", type=int, default=40, help="Longest answer.")
    parser.add_argument("--prompt", action="append", help="May be given several times.")
    args = parser.parse_args()
    if not compare(args.model, args.prompt or PROMPTS, args.max_tokens):
        sys.exit(1)


if __name__ == "__main__":
    main()
