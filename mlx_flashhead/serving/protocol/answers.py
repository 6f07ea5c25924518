"""Answers in the form of OpenAI's API: whole, or in chunks."""

import time
import uuid
from dataclasses import replace
from itertools import accumulate
from typing import Any

from ...version import __version__
from .answer_text import Token
from .logprobs import TokenLogprobs, TokenNames
from .requests import Request
from .valid_json import dumps


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
            return [_call(one) for one in (parsed if isinstance(parsed, list) else [parsed])]
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
    return {
        "id": parsed.get("id") or f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": parsed["name"], "arguments": dumps(parsed["arguments"])},
    }


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
