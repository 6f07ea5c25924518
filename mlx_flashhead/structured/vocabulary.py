"""A tokenizer as grammars see it."""

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from ..common.command import from_extra


def llguidance(module: str = "llguidance") -> ModuleType:
    """Imports llguidance or one of its modules.

    Raises:
        ValueError: If it is absent; the message names its extra.
    """
    return from_extra(module, "structured", "Structured output")


class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        end_tokens: Those that end a text.

    Attributes:
        tokens: llguidance's form of them.
        end_tokens: Those that end a text.
        size: The number of tokens.
        special: The numbers of tokens that no plain text becomes, by their texts.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, end_tokens: tuple[int, ...]):
        make = llguidance("llguidance.hf").from_tokenizer
        self.tokens = make(tokenizer, eos_token=[*end_tokens])
        self.end_tokens = end_tokens
        self.size: int = self.tokens.vocab_size
        added = tokenizer.get_added_vocab()
        is_special = self.tokens.is_special_token
        # these are no plain text for llguidance, which a grammar must name by their numbers
        self.special: Mapping[str, int] = {
            text: token for text, token in added.items() if is_special(token)
        }

    @cached_property
    def other_than_text(self) -> list[int]:
        """The tokens that are no text by themselves: special ones, and parts of characters."""
        return [token for token in range(self.size) if not self._is_text(token)]

    @cached_property
    def everything(self) -> np.ndarray:
        """The mask that allows all tokens, (⌈V/32⌉,) uint32."""
        return self.words(range(self.size))

    def words(self, tokens: Iterable[int]) -> np.ndarray:
        """A mask of tokens as ``compute_bitmask`` returns one: (⌈V/32⌉,) uint32."""
        bits = np.zeros(-(-self.size // 32) * 32, dtype=bool)
        bits[list(tokens)] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def _is_text(self, token: int) -> bool:
        try:
            self.tokens.decode_bytes([token]).decode()
        except UnicodeDecodeError:
            return False
        return not self.tokens.is_special_token(token)


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """A tokenizer's vocabulary, which takes a second to make.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer.
    """
    # It is within mlx-lm's.
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    ends = {tokenizer.eos_token_id} if inner is tokenizer else tokenizer.eos_token_ids
    return _vocabulary(inner, tuple(sorted(ends)))


_vocabulary = lru_cache(4)(Vocabulary)
