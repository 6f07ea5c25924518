"""A tokenizer as grammars see it: the bytes of each token, and where a mark is completed."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
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

    Attributes:
        tokens: llguidance's form of them.
        end_tokens: Those that end a text.
        size: The number of tokens.
        special: The numbers of tokens that no plain text becomes, by their texts.
        matchers: Matchers to be copied, each by its grammar and limit.
        wrong_tokens: Of a grammar of calls, the tokens that complete its mark and go on wrongly.

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
        self._marks: dict[str, Mark] = {}
        self.matchers: dict[tuple[str, int], Any] = {}  # that have followed nothing, by grammar
        self.wrong_tokens: dict[str, dict[int, list[int]]] = {}

    def mark(self, text: str) -> "Mark":
        """Returns the mark with a text, which is made once."""
        if text not in self._marks:
            self._marks[text] = Mark(self, text)
        return self._marks[text]

    def text_of(self, token: int) -> bytes:
        """The bytes of a token; none of one that the tokenizer does not have."""
        return self.tokens.decode_bytes([token]) if token < self.size else b""

    @cached_property
    def texts(self) -> list[bytes]:
        """The bytes of each token, in the order of their numbers."""
        decode = self.tokens.decode_bytes
        return [decode([token]) for token in range(self.size)]

    def beginning_with(self, prefix: bytes) -> Iterator[int]:
        """The tokens whose bytes begin with a prefix."""
        order = self._order
        texts = self.texts
        at = bisect_left(order, prefix, key=texts.__getitem__)
        while at < len(order) and texts[order[at]].startswith(prefix):
            yield order[at]
            at += 1

    @cached_property
    def _order(self) -> list[int]:
        """All tokens, in the order of their bytes."""
        return sorted(range(self.size), key=self.texts.__getitem__)

    def words(self, tokens: Any) -> np.ndarray:
        """A mask of tokens as ``compute_bitmask`` returns one: (⌈V/32⌉,) uint32."""
        bits = np.zeros(-(-self.size // 32) * 32, dtype=bool)
        bits[list(tokens)] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)


class Mark:
    """A text that a sequence of tokens may complete, in whatever parts.

    How far a sequence has come is a number of bytes: of the longest beginning of the mark that it
    ends with.
    """

    def __init__(self, vocabulary: Vocabulary, text: str):
        self.text = text
        self._bytes = text.encode()
        self._vocabulary = vocabulary
        # for each beginning, the length of the longest shorter beginning that it ends with
        self._shorter = [0, 0]
        for length in range(1, len(self._bytes)):
            known = self._shorter[length]
            while known and self._bytes[known] != self._bytes[length]:
                known = self._shorter[known]
            self._shorter.append(known + (self._bytes[known] == self._bytes[length]))
        self._overshooting: dict[int, list[tuple[int, int]]] = {}
        self._completing: dict[int, np.ndarray] = {}

    def advance(self, length: int, text: bytes) -> tuple[int, int | None]:
        """Goes on from a number of the mark's bytes.

        Returns:
            The number after ``text``, and where in it the mark is complete for the first time,
            which is the end of a token's effect.
        """
        for at, byte in enumerate(text):
            while length and self._bytes[length] != byte:
                length = self._shorter[length]
            length += self._bytes[length] == byte
            if length == len(self._bytes):
                return 0, at + 1
        return length, None

    def overshooting(self, length: int) -> list[tuple[int, int]]:
        """Finds the tokens that complete the mark and go on.

        Returns:
            Each token with the number of the mark's bytes before it; -1 where the mark begins
            within the token, after other text.
        """
        if length not in self._overshooting:
            texts = self._vocabulary.texts
            found = []
            for token in self._tokens_completing(length):
                _, end = self.advance(length, texts[token])
                if end is not None and end < len(texts[token]):
                    found.append((token, max(-1, len(self._bytes) - end)))
            self._overshooting[length] = found
        return self._overshooting[length]

    def completing(self, length: int) -> np.ndarray:
        """A mask of the tokens that complete the mark: (⌈V/32⌉,) uint32."""
        if length not in self._completing:
            self._completing[length] = self._vocabulary.words(self._tokens_completing(length))
        return self._completing[length]

    def _tokens_completing(self, length: int) -> set[int]:
        tokens = {*self._containing}
        while True:
            tokens |= {*self._vocabulary.beginning_with(self._bytes[length:])}
            if not length:
                return tokens
            length = self._shorter[length]

    @cached_property
    def _containing(self) -> list[int]:
        texts = self._vocabulary.texts
        return [token for token, text in enumerate(texts) if self._bytes in text]


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """A tokenizer's vocabulary, which takes a second to make.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer.
    """
    ends = getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id]
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # within mlx-lm's
    return _vocabulary(inner, tuple(sorted(ends)))


_vocabulary = lru_cache(4)(Vocabulary)
