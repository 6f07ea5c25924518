"""A tokenizer as grammars see it."""

import copy
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
        backend: A ``tokenizers.Tokenizer``.
        end_tokens: Those that end a text.

    Attributes:
        tokens: llguidance's form of them.
        end_tokens: Those that end a text.
        size: The number of tokens.
        special: The numbers of tokens that no plain text becomes, by their texts.

    Source: ``from_tokenizer`` in llguidance's hf.py, which takes transformers' tokenizers alone.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer.
    """

    def __init__(self, backend: Any, end_tokens: tuple[int, ...]):
        plain = copy.copy(backend)
        plain.no_padding()
        plain.no_truncation()
        make = llguidance().LLTokenizer
        self.tokens = make(plain.to_str(), eos_token=[*end_tokens])
        self.end_tokens = end_tokens
        self.size: int = self.tokens.vocab_size
        # They are no plain text for llguidance: a grammar must name them by their numbers.
        special = {}
        for token, added in backend.get_added_tokens_decoder().items():
            if self.tokens.is_special_token(token):
                special[added.content] = token
        self.special: Mapping[str, int] = special

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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            "Structured output needs a fast tokenizer, as Hugging Face calls it, and this model "
            "has another one: leave the form of the text open."
        )
    # Hugging Face's has one, and mlx-lm's may have several.
    ends = getattr(tokenizer, "eos_token_ids", tokenizer.eos_token_id)
    if isinstance(ends, int):
        ends = [ends]
    return _vocabulary(backend, tuple(sorted(ends)))


_vocabulary = lru_cache(4)(Vocabulary)
