"""Log-probabilities of tokens, with the tokens' texts and bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The value of OpenAI's API for a token that is too unlikely to have a logprob.
VERY_UNLIKELY = -9999.0


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token and the likeliest tokens at its place.

    Attributes:
        token: Its id.
        logprob: Its log-probability.
        tops: (id, log-probability) of the likeliest tokens, in order.
    """

    token: int
    logprob: float
    tops: tuple[tuple[int, float], ...]


def token_logprobs(logprobs: mx.array, token: int, n_tops: int) -> TokenLogprobs:
    """The log-probabilities of a chosen token and of the likeliest ones.

    Args:
        logprobs: (V,) log-probabilities of all tokens.
        token: The chosen token.
        n_tops: Number of likeliest tokens.
    """
    n_tops = min(n_tops, logprobs.size)
    ids: Any = []
    if n_tops:
        ids = mx.argpartition(-logprobs, kth=n_tops - 1)[:n_tops].tolist()
    chosen, *tops = map(_finite, cast(list[float], logprobs[mx.array([token, *ids])].tolist()))
    in_order = sorted(zip(ids, tops, strict=True), key=lambda top: -top[1])
    return TokenLogprobs(token, chosen, tuple(in_order))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else VERY_UNLIKELY


class TokenNames:
    """The texts of a tokenizer's tokens.

    Args:
        tokenizer: mlx-lm's wrapper.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._decoded = _byte_decoder(tokenizer)

    def bytes(self, token: int) -> bytes:
        """The bytes of a token's text, possibly incomplete characters."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the head without a token
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return name.encode()
        return self._decoded(name)

    def text(self, token: int) -> str:
        """A token's text; for bytes that are not a text, OpenAI's name for them."""
        content = self.bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def chat(self, found: TokenLogprobs) -> dict[str, Any]:
        """The form of a chat's answer."""
        tops = [self._named(*top) for top in found.tops]
        return self._named(found.token, found.logprob) | {"top_logprobs": tops}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        content = self.bytes(token)
        text = content.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(content)}


def _byte_decoder(tokenizer: Any) -> Callable[[str], bytes]:
    kind = str(getattr(tokenizer.backend_tokenizer, "decoder", "")) if tokenizer.is_fast else ""
    if "ByteLevel" in kind:
        letters = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
        return lambda name: b"".join(letters.get(c) or c.encode() for c in name)
    if "ByteFallback" in kind or not tokenizer.is_fast:
        return _sentencepiece_bytes
    return lambda name: tokenizer.convert_tokens_to_string([name]).encode()


def _sentencepiece_bytes(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()
