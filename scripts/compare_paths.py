"""Generates with a FlashHead model on both paths, Metal and plain MLX, and compares the tokens.

    python scripts/compare_paths.py --model FOLDER [--max-tokens 40] [--prompt TEXT …]

Ends with 1 if the tokens differ, and prints the place and the logits that decided. Two tokens whose
logits differ by rounding alone are a tie, and the paths may choose differently.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

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


@dataclass(frozen=True)
class Comparison:
    """The answers of both paths to one prompt.

    Attributes:
        prompt: The prompt.
        tokens: By path, the greedy tokens.
        texts: By path, their text.
        logits: By path, the dense logit of the first token that differs; None if all are the same.
        rounding: Greatest difference of two logits of this size by rounding.
    """

    prompt: str
    tokens: dict[str, list[int]]
    texts: dict[str, str]
    logits: dict[str, float] | None = None
    rounding: float = 0.0

    @property
    def same(self) -> int:
        """Tokens before the first one that differs."""
        pairs = zip(*self.tokens.values(), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def gap(self) -> float:
        """Between the logits of the first two tokens that differ."""
        return abs(self.logits["metal"] - self.logits["mlx"]) if self.logits else 0.0

    @property
    def agrees(self) -> bool:
        """Whether all tokens are the same, or the first that differ are a tie."""
        return self.logits is None or self.gap <= self.rounding

    def __str__(self) -> str:
        count = max(map(len, self.tokens.values()))
        said = f"{self.prompt!r}: {self.same} of {count} tokens are the same"
        if self.logits is None:
            return f"{said}."
        kind = "a tie" if self.agrees else "no tie"
        lines = [
            f"  {path:5} takes token {self.tokens[path][self.same]}, dense logit "
            f"{self.logits[path]:.6f}: {self.texts[path]!r}"
            for path in PATHS
        ]
        parted = f"then the paths part. Their logits are {self.gap:.2g} apart, and rounding makes "
        return "\n".join([f"{said}, {parted}{self.rounding:.2g}: {kind}.", *lines])


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, heads take this path."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(BACKEND_VARIABLE)
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def generated(model, tokenizer, prompt: str, max_tokens: int) -> tuple[list[int], str]:
    """FlashHead's own greedy tokens, without the check that would correct them, and their text."""
    answers = list(stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, check=False))
    return [answer.token for answer in answers], "".join(answer.text for answer in answers)


def compare(folder: str, prompts=PROMPTS, max_tokens: int = 40) -> list[Comparison]:
    """Generates with a checkpoint on both paths.

    Args:
        folder: Folder or repository of a FlashHead checkpoint.
        prompts: What to generate from.
        max_tokens: Longest answer.

    Raises:
        ValueError: If the model cannot be loaded, or its head does not run on one of the paths.
    """
    said: dict[str, list[tuple[list[int], str]]] = {}
    for path in PATHS:
        with backend(path):
            model, tokenizer = load(folder)
            taken = get_flash_head(model).backend
            if taken != path:
                raise ValueError(
                    f"The head runs on the path {taken!r}, and {path!r} was asked for."
                )
            said[path] = [generated(model, tokenizer, prompt, max_tokens) for prompt in prompts]
    return [
        _parted(model, tokenizer, prompt, dict(zip(PATHS, answers, strict=True)))
        for prompt, *answers in zip(prompts, *said.values(), strict=True)
    ]


def _parted(model, tokenizer, prompt: str, answers: dict) -> Comparison:
    tokens = {path: ids for path, (ids, _) in answers.items()}
    texts = {path: text for path, (_, text) in answers.items()}
    comparison = Comparison(prompt, tokens, texts)
    same = comparison.same
    if tokens["metal"] == tokens["mlx"]:
        return comparison
    with get_flash_head(model).dense():
        sequence = [*tokenizer.encode(prompt), *tokens["mlx"][:same]]
        logits = model(mx.array([sequence]))[0, -1]
    # an answer ends with the token that ends it, so that both have one here
    of_tokens = {path: logits[ids[same]].item() for path, ids in tokens.items()}
    relative = max(SUMMATION, 2 * mx.finfo(logits.dtype).eps)
    rounding = relative * max(map(abs, of_tokens.values()))
    return Comparison(prompt, tokens, texts, of_tokens, rounding)


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
    comparisons = compare(args.model, args.prompt or PROMPTS, args.max_tokens)
    print(*comparisons, sep="\n")
    if not all(comparison.agrees for comparison in comparisons):
        sys.exit(1)


if __name__ == "__main__":
    main()
