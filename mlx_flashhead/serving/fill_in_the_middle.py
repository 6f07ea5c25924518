"""Prompts that ask a model for the text between two others, in the tokens of its vocabulary."""

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class MiddleFormat:
    """How a family of models marks the text before a gap, the text after it, and the gap.

    Attributes:
        before: The token of the text before the gap.
        after: The token of the text after it.
        middle: The token after which the model writes; empty if it needs none.
        after_first: Whether the text after the gap comes first.
    """

    before: str
    after: str
    middle: str = ""
    after_first: bool = False

    def prompt(self, before: str, after: str) -> str:
        """The text whose continuation stands between ``before`` and ``after``."""
        marked_before = self.before + before
        marked_after = self.after + after
        if self.after_first:
            return marked_after + marked_before + self.middle
        return marked_before + marked_after + self.middle

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the format."""
        return tuple(token for token in (self.before, self.after, self.middle) if token)


# The formats of published models, as their cards and tokenizers have them.
MIDDLE_FORMATS = (
    # Qwen2.5-Coder, Qwen3-Coder, CodeGemma, Granite.
    MiddleFormat("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    # StarCoder, StableCode, Granite Code, Yi-Coder.
    MiddleFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    # DeepSeek-Coder, whose second token stands for the gap.
    MiddleFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    # Code Llama.
    MiddleFormat("▁<PRE>", "▁<SUF>", "▁<MID>"),
    # Codestral, whose prompt begins with the text after the gap.
    MiddleFormat("[PREFIX]", "[SUFFIX]", after_first=True),
    # Seed-Coder.
    MiddleFormat("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", after_first=True),
)
# Tokens with which such models end the middle, beside their end tokens.
END_TOKENS = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<file_sep>", "<|file_separator|>")


def middle_format(vocabulary: Container[str]) -> MiddleFormat | None:
    """The format whose tokens are all in a vocabulary; None if there is none."""
    for known in MIDDLE_FORMATS:
        if all(token in vocabulary for token in known.tokens):
            return known
    return None
