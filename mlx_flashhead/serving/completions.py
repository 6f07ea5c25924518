"""An answer from its tokens to OpenAI's JSON: text, thoughts, tool calls, log-probabilities."""

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..models.compat.mlx_lm import TextStateMachine, make_text_state_machine
from ..version import __version__
from .api_error import dumps
from .requests import Request

# The value of OpenAI's API for a token that is too unlikely to have a logprob.
VERY_UNLIKELY = -9999.0
# (id, log-probability) of a chosen token, and then of the likeliest tokens at its place, in order.
TokenLogprobs = list[tuple[int, float]]


def token_logprobs(logprobs: mx.array, token: int, n_tops: int) -> TokenLogprobs:
    """Those of a chosen token and of the ``n_tops`` likeliest ones, of all ``logprobs`` (V,)."""
    n_tops = min(n_tops, logprobs.size)
    likeliest: Any = mx.argpartition(-logprobs, kth=n_tops - 1)[:n_tops].tolist() if n_tops else []
    ids = [token, *likeliest]
    values: Any = logprobs[mx.array(ids)].tolist()
    values = [value if math.isfinite(value) else VERY_UNLIKELY for value in values]
    chosen, *tops = zip(ids, values, strict=True)
    return [chosen, *sorted(tops, key=lambda top: -top[1])]


@dataclass
class Token:
    """What a token adds to an answer. Any part may be empty."""

    content: str = ""
    reasoning: str = ""  # a thought before it
    calls: list[Any] = field(default_factory=list)  # complete ones, as a model writes them
    finish_reason: str | None = None  # "stop" or "length" if the answer ends with it
    logprobs: TokenLogprobs | None = None  # if the request asks for it; None for the end token

    def add(self, other: "Token") -> None:
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.finish_reason = other.finish_reason


class AnswerText:
    """The text of one answer, which is emitted as soon as a part is certain.

    It ends before a text of ``stop``, and begins in a ``state`` of mlx-lm's names. mlx-lm's
    detokenizers drop a space at its beginning, unless ``keep_space`` is set.
    """

    def __init__(self, tokenizer: Any, stop: TextStateMachine, state: str, keep_space=False):
        self._detokenizer = tokenizer.detokenizer
        if keep_space:
            # they keep a space that follows another word
            for token in tokenizer.encode("a", add_special_tokens=False):
                self._detokenizer.add_token(token)
            _ = self._detokenizer.last_segment
        self._until_stop = stop.make_state()
        self._parts = make_text_state_machine(tokenizer).make_state(state)
        self._certain, self._call = Token(), ""  # not emitted yet

    def add(self, token: int) -> Token:
        """Adds a token. Returns what is certain now, which a stop text may end."""
        self._detokenizer.add_token(token)
        return self._take(ends=False)

    def finish(self) -> Token:
        """Ends the answer. Returns what was held back, up to a stop text in it."""
        self._detokenizer.finalize()
        return self._take(ends=True)

    def _take(self, *, ends: bool) -> Token:
        text = self._detokenizer.last_segment
        self._until_stop, segments = TextStateMachine.split(self._until_stop, text)
        self._split(segments[0][1])
        stopped = self._until_stop[0] is None
        if ends and not stopped:
            self._until_stop, held, _ = TextStateMachine.flush(self._until_stop)
            self._split(held)
        if ends or stopped:  # what was held back as a possible beginning of a marker is none
            self._parts, held, name = TextStateMachine.flush(self._parts)
            self._add(name, held)
            self._end_call()
        certain, self._certain = self._certain, Token()
        certain.finish_reason = "stop" if stopped else None
        return certain

    def _split(self, text: str) -> None:
        self._parts, segments = TextStateMachine.split(self._parts, text)
        for name, part in segments:
            self._add(name, part)

    def _add(self, name: str, text: str) -> None:
        if name == "tool":
            self._call += text
        elif name == "reasoning":
            self._certain.reasoning += text
        elif name == "normal":
            self._end_call()
            self._certain.content += text

    def _end_call(self) -> None:
        if self._call:
            self._certain.calls.append(self._call)
            self._call = ""


class Choice:
    """One of a request's answers, up to its latest token."""

    def __init__(self, request: Request, index: int):
        self.index = index
        self.finish_reason: str | None = None
        self._request = request
        self._names = TokenNames(request.served.tokenizer)
        self._first_delta: dict[str, Any] = {"role": "assistant", "content": ""}
        self._whole = Token()  # with the calls as they are sent
        self._logprobs: list[TokenLogprobs] = []
        self._offset = 0  # characters of the text before the next token

    def add(self, token: Token) -> dict[str, Any] | None:
        """Adds a token: the choice of a chunk, or None if there is nothing to send."""
        content, calls, n_before = token.content, [], len(self._whole.calls)
        for text in token.calls:
            read = self._read_calls(text)
            calls += read
            content += "" if read else text
        self._whole.add(replace(token, content=content, calls=calls))
        entries = [] if token.logprobs is None else [token.logprobs]
        self._logprobs += entries
        self.finish_reason = token.finish_reason
        if token.finish_reason == "stop" and self._whole.calls:
            self.finish_reason = "tool_calls"
        if not (content or token.reasoning or calls or entries or self.finish_reason):
            return None
        choice = self._choice(entries)
        if not self._request.chat:
            return choice | {"text": content}
        delta, self._first_delta = self._first_delta, {}
        if content:
            delta["content"] = content
        if token.reasoning:
            delta["reasoning"] = token.reasoning
        if calls:
            delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(calls, n_before)]
        return choice | {"delta": delta}

    def whole(self) -> dict[str, Any]:
        """The whole answer as a choice."""
        self._offset = 0
        choice, whole = self._choice(self._logprobs), self._whole
        if not self._request.chat:
            return choice | {"text": whole.content}
        message: dict[str, Any] = {"role": "assistant", "content": whole.content, "refusal": None}
        if whole.reasoning:
            message["reasoning"] = whole.reasoning
        if whole.calls:
            message |= {"content": whole.content or None, "tool_calls": whole.calls}
        return choice | {"message": message}

    def _read_calls(self, text: str) -> list[dict[str, Any]]:
        """The calls in a text that is marked as one. Without any, the text is content after all."""
        if not self._request.tools:
            return []
        try:
            parsed = self._request.served.tokenizer.tool_parser(text, self._request.tools)
            return [_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # mlx-lm's parsers raise any type
            return []

    def _choice(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self._request.logprobs is not None and self._request.chat:
            named = [[self._names.named(*one) for one in entry] for entry in entries]
            content = [chosen | {"top_logprobs": tops} for chosen, *tops in named]
            logprobs = {"content": content, "refusal": None}
        elif self._request.logprobs is not None:
            text_of = self._names.text
            texts = [text_of(token) for (token, _), *_ in entries]
            *offsets, self._offset = accumulate(map(len, texts), initial=self._offset)
            logprobs = {
                "tokens": texts,
                "token_logprobs": [logprob for (_, logprob), *_ in entries],
                "top_logprobs": [{text_of(i): lp for i, lp in tops} for _, *tops in entries],
                "text_offset": offsets,
            }
        return {"index": self.index, "logprobs": logprobs, "finish_reason": self.finish_reason}


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    function = {"name": parsed["name"], "arguments": dumps(parsed["arguments"])}
    number = parsed.get("id") or f"call_{uuid.uuid4().hex}"
    return {"id": number, "type": "function", "function": function}


def envelope(request: Request) -> dict[str, Any]:
    """What all parts of an answer have beside their choices."""
    prefix, kind = ("chatcmpl", "chat.completion") if request.chat else ("cmpl", "text_completion")
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": f"{kind}.chunk" if request.chat and request.stream else kind,
        "created": int(time.time()),
        "model": request.served.name,
        "system_fingerprint": f"mlx_flashhead-{__version__}",
    }


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
