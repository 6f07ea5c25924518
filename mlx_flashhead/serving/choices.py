"""Answers in the form of OpenAI's completions: choices of chunks and of whole answers."""

import time
import uuid
from functools import cache
from itertools import accumulate
from typing import Any

from ..version import __version__
from .answer_text import Token, TokenLogprobs
from .api_errors import ApiError
from .dialects import Dialect, StreamEvent
from .jobs import Job
from .requests import Request


class Choice:
    """One of a request's answers in OpenAI's form, up to its latest token."""

    def __init__(self, request: Request, index: int):
        self._request = request
        self._index = index
        self.finish_reason: str | None = None
        self._first_delta: dict[str, Any] = {"role": "assistant", "content": ""}
        # All tokens so far, with the calls as they are sent.
        self._whole = Token()
        # The number of characters before the next token.
        self._offset = 0

    def add(self, token: Token) -> dict[str, Any] | None:
        """Adds a token: the choice of a chunk, or None if there is nothing to send."""
        n_calls_before = len(self._whole.calls)
        self._whole.add(token)
        self.finish_reason = token.finish_reason
        if token.finish_reason == "stop" and self._whole.calls:
            self.finish_reason = "tool_calls"
        is_empty = not (token.content or token.reasoning or token.calls or token.logprobs)
        if is_empty and self.finish_reason is None:
            return None
        choice = self._choice(token.logprobs)
        if not self._request.chat:
            return {**choice, "text": token.content}
        calls = [{"index": i, **call} for i, call in enumerate(token.calls, n_calls_before)]
        delta = self._first_delta | _said(token.content, token.reasoning, calls)
        self._first_delta = {}
        return {**choice, "delta": delta}

    def whole(self) -> dict[str, Any]:
        """The choice of a whole answer."""
        self._offset = 0
        whole = self._whole
        choice = self._choice(whole.logprobs)
        if not self._request.chat:
            return {**choice, "text": whole.content}
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        if whole.calls:
            message["content"] = None
        message |= _said(whole.content, whole.reasoning, whole.calls)
        return {**choice, "message": message}

    def _choice(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        return {
            "index": self._index,
            "logprobs": self._logprobs(entries),
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        if self._request.chat:
            return self._chat_logprobs(entries)
        return self._text_logprobs(entries)

    def _chat_logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        tokenizer = self._request.served.tokenizer

        def named(token: int, logprob: float) -> dict[str, Any]:
            content = token_bytes(tokenizer, token)
            text = content.decode("utf-8", "replace")
            return {"token": text, "logprob": logprob, "bytes": list(content)}

        content = []
        for chosen, *tops in entries:
            content.append({**named(*chosen), "top_logprobs": [named(*top) for top in tops]})
        return {"content": content, "refusal": None}

    def _text_logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        tokenizer = self._request.served.tokenizer
        chosen = [entry[0] for entry in entries]
        texts = [token_text(tokenizer, token) for token, _ in chosen]
        *offsets, self._offset = accumulate(map(len, texts), initial=self._offset)
        tops = []
        for _, *likeliest in entries:
            tops.append({token_text(tokenizer, token): logprob for token, logprob in likeliest})
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob in chosen],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class Choices:
    """The answer to a request of chat completions or completions."""

    def __init__(self, jobs: list[Job], body: dict[str, Any]):
        request = jobs[0].request
        fields = request.fields
        self._jobs = jobs
        self._choices = [Choice(request, job.index) for job in jobs]
        id_prefix = "cmpl"
        object_name = "text_completion"
        if request.chat:
            id_prefix = "chatcmpl"
            object_name = "chat.completion"
            if fields.stream:
                object_name = "chat.completion.chunk"
        # All parts of an answer have this beside their choices.
        self._common = {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "object": object_name,
            "created": int(time.time()),
            "model": request.served.name,
            "system_fingerprint": f"mlx_flashhead-{__version__}",
        }
        options = fields.stream_options
        self._include_usage = fields.stream and options is not None and options.include_usage
        if self._include_usage:
            # The last part alone says it.
            self._common["usage"] = None

    @property
    def is_complete(self) -> bool:
        """Whether all of its texts are."""
        return all(choice.finish_reason is not None for choice in self._choices)

    def begin(self) -> list[StreamEvent]:
        """Nothing: chunks begin with a text."""
        return []

    def add(self, index: int, token: Token) -> list[StreamEvent]:
        """The chunk of a token."""
        choice = self._choices[index].add(token)
        if choice is None:
            return []
        return [StreamEvent(self._common | {"choices": [choice]})]

    def end(self) -> list[StreamEvent]:
        """The usage, if it is wanted, and the end."""
        done = StreamEvent("[DONE]")
        if not self._include_usage:
            return [done]
        last_chunk = self._common | {"choices": [], "usage": usage_of(self._jobs)}
        return [StreamEvent(last_chunk), done]

    def fail(self, problem: ApiError) -> list[StreamEvent]:
        """The chunk with the error."""
        return refused(problem)

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [choice.whole() for choice in self._choices]
        return self._common | {"choices": choices, "usage": usage_of(self._jobs)}


def refused(problem: ApiError) -> list[StreamEvent]:
    """The only event of a stream that is refused."""
    return [StreamEvent(problem.as_json())]


# Fields whose grammars take long to compile.
_FORMS = ("response_format", "regex", "grammar", "tools")
CHATS = Dialect(chat=True, fields=dict, answer=Choices, refused=refused, forms=_FORMS)
TEXTS = Dialect(chat=False, fields=dict, answer=Choices, refused=refused, forms=_FORMS)


def usage_of(jobs: list[Job]) -> dict[str, Any]:
    """The tokens of a request's answers, in OpenAI's words."""
    # A prompt with several answers counts once.
    once = jobs[:: jobs[0].request.fields.n]
    n_read = sum(len(job.prompt.tokens) for job in once)
    n_generated = sum(len(job.tokens) for job in jobs)
    return {
        "prompt_tokens": n_read,
        "completion_tokens": n_generated,
        "total_tokens": n_read + n_generated,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in once)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(job.n_guessed for job in jobs),
        },
    }


def _said(content: str, thought: str, calls: list[Any]) -> dict[str, Any]:
    """What there is of a message. A thought has mlx-lm's name, and that of most others."""
    said = {
        "content": content,
        "reasoning": thought,
        "reasoning_content": thought,
        "tool_calls": calls,
    }
    return {name: value for name, value in said.items() if value}


@cache
def _bytes_of_letters() -> dict[str, bytes]:
    """The byte that each letter of a byte-level tokenizer stands for."""
    # It warns that there is no PyTorch, unless mlx-lm is imported before.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token's text, possibly incomplete characters."""
    # A row of the head may have no token, and then no name.
    name = tokenizer.convert_ids_to_tokens(token) or ""
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        bytes_of = _bytes_of_letters()
        return b"".join(bytes_of.get(letter) or letter.encode() for letter in name)
    # sentencepiece's name of a byte, such as <0x0A>
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text; for bytes that are not a text, OpenAI's name for them."""
    content = token_bytes(tokenizer, token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
