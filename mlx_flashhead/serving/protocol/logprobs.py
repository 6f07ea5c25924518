"""Log-probabilities of tokens, with the tokens' texts and bytes."""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The value of OpenAI's API for a token that is too unlikely to have a logprob.
VERY_UNLIKELY = -9999.0
# (id, log-probability) of a chosen token, and then of the likeliest tokens at its place, in order.
TokenLogprobs = list[tuple[int, float]]


def token_logprobs(logprobs: mx.array, token: int, n_tops: int) -> TokenLogprobs:
    """Those of a chosen token and of the ``n_tops`` likeliest ones, of all ``logprobs`` (V,)."""
    n_tops = min(n_tops, logprobs.size)
    likeliest: Any = mx.argpartition(-logprobs, kth=n_tops - 1)[:n_tops].tolist() if n_tops else []
    ids = [token, *likeliest]
    values = cast(list[float], logprobs[mx.array(ids)].tolist())
    values = [value if math.isfinite(value) else VERY_UNLIKELY for value in values]
    chosen, *tops = zip(ids, values, strict=True)
    return [chosen, *sorted(tops, key=lambda top: -top[1])]


class TokenNames:
    """The texts of a tokenizer's tokens."""

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

    def named(self, token: int, logprob: float) -> dict[str, Any]:
        """The form of a chat's answer."""
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
