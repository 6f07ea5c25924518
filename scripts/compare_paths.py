"""Generates with a FlashHead model on both paths, Metal and plain MLX, and compares the tokens.

    python scripts/compare_paths.py --model FOLDER [--max-tokens 40] [--prompt TEXT …]

Ends with 1 if the tokens differ, and prints the place and the logits that decided. Two tokens whose
logits differ by rounding alone are a tie, and the paths may choose differently.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mlx.core as mx

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)  # works uninstalled too

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
# Of a logit: float32 sums of a thousand terms in another order, or two steps of a coarser dtype.
SUMMATION = 1e-5


class Answer(NamedTuple):
    """Greedy tokens of one path, and their text."""

    tokens: list[int]
    text: str


def generated(model, tokenizer, prompt: str, max_tokens: int) -> Answer:
    """FlashHead's own greedy tokens, without the check that would correct them."""
    answers = list(stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, verify=False))
    return Answer([answer.token for answer in answers], "".join(answer.text for answer in answers))


def compare(folder: str, prompts=PROMPTS, max_tokens: int = 40) -> Iterator[tuple[bool, str]]:
    """Generates with a checkpoint on both paths: whether they agree on each prompt, and a sentence.

    Raises:
        ValueError: If the model cannot be loaded, or its head does not run on one of the paths.
    """
    said = []
    for path in PATHS:
        with mock.patch.dict(os.environ, {BACKEND_VARIABLE: path}):
            model, tokenizer = load(folder)
            taken = get_flash_head(model).backend
            if taken != path:
                raise ValueError(
                    f"The head runs on the path {taken!r}, and {path!r} was asked for."
                )
            said.append([generated(model, tokenizer, prompt, max_tokens) for prompt in prompts])
    for prompt, *answers in zip(prompts, *said, strict=True):

        def logits_after(tokens: list[int], prompt=prompt) -> mx.array:
            with get_flash_head(model).dense():
                return model(mx.array([[*tokenizer.encode(prompt), *tokens]]))[0, -1]

        yield verdict(prompt, answers, logits_after)


def verdict(
    prompt: str, answers: Sequence[Answer], logits_after: Callable[[list[int]], mx.array]
) -> tuple[bool, str]:
    """Whether two answers agree, and a sentence on it, with the logits that decided.

    ``logits_after`` gives the dense logits (V,) after the prompt and some tokens.
    """
    pairs = list(zip(*(answer.tokens for answer in answers), strict=False))
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    said = f"{prompt!r}: {same} of {max(len(a.tokens) for a in answers)} tokens are the same"
    if answers[0].tokens == answers[1].tokens:
        return True, f"{said}."
    # an answer ends with the token that ends it, so that both have one here
    logits = logits_after(answers[0].tokens[:same])
    chosen = [logits[token].item() for token in pairs[same]]
    gap = abs(chosen[0] - chosen[1])
    rounding = max(SUMMATION, 2 * mx.finfo(logits.dtype).eps) * max(map(abs, chosen))
    kind = "a tie" if gap <= rounding else "no tie"
    lines = [
        f"  {path:5} takes token {token}, dense logit {logit:.6f}: {answer.text!r}"
        for path, answer, token, logit in zip(PATHS, answers, pairs[same], chosen, strict=True)
    ]
    parted = f"then the paths part. Their logits are {gap:.2g} apart, and rounding makes "
    return gap <= rounding, "\n".join([f"{said}, {parted}{rounding:.2g}: {kind}.", *lines])


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Folder of a FlashHead checkpoint.")
    parser.add_argument("--max-tokens", type=int, default=40, help="Longest answer.")
    parser.add_argument("--prompt", action="append", help="May be given several times.")
    args = parser.parse_args()
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}: give 1 or more.")
    verdicts = list(compare(args.model, args.prompt or PROMPTS, args.max_tokens))
    print(*(said for _, said in verdicts), sep="\n")
    if not all(agrees for agrees, _ in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
