"""A conversation with a model: its messages, and the prompt cache that follows them.

The messages are the truth. For each question all of them go through the tokenizer's chat template.
The cache keeps the tokens that it shares with the result, and the rest of it is trimmed. A cache
that cannot be trimmed is made anew. The way in which an answer ended therefore does not matter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..lossless.generation import stream_generate
from ..models.compat.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from .transcript import ASSISTANT, SYSTEM, USER, Message

LENGTH, STOPPED = "length", "stopped"


@dataclass
class Answer:
    """An answer of the model."""

    text: str = ""
    n_prompt: int = 0  # tokens of the conversation with the question
    n_cached: int = 0  # of these, tokens that were in the cache already
    n_tokens: int = 0
    tokens_per_second: float | None = None  # mlx-lm's measure, of two tokens or more
    finish: str = STOPPED  # by the user, "stop" at an end-of-text token, "length" at the limit


class _Stopped(Exception):
    """The user stops while the prompt is read."""


class FollowingCache:
    """A prompt cache and the tokens that it holds."""

    def __init__(self, model: nn.Module, max_kv_size: int | None):
        self._model, self._max_kv_size = model, max_kv_size
        self.clear()
        # some models make caches of their own
        sizes = [getattr(cache, "max_size", None) for cache in self.arrays]
        self.limited = max_kv_size is not None and max_kv_size in sizes

    def clear(self) -> None:
        """Forgets everything."""
        self.arrays = make_prompt_cache(self._model, self._max_kv_size)
        self.token_ids: list[int] = []  # that were put in, also those that were dropped since

    def follow(self, prompt: list[int]) -> int:
        """Keeps the tokens with which ``prompt`` begins, all but the last at most: how many."""
        limit = min(len(self.token_ids), len(prompt) - 1)
        shared = next((i for i in range(limit) if self.token_ids[i] != prompt[i]), limit)
        if too_many := len(self.token_ids) - shared:
            if not can_trim_prompt_cache(self.arrays):
                self.clear()
                return 0
            trim_prompt_cache(self.arrays, too_many)
            del self.token_ids[shared:]
        return shared


class Conversation:
    """Questions and answers in turn.

    Args:
        model: Any model, with a FlashHead or dense.
        tokenizer: mlx-lm's wrapper, with a chat template.
        system_prompt: The beginning of every conversation.
        max_kv_size: Tokens that the cache keeps, the first four and the newest; default: all.

    Raises:
        ValueError: If the tokenizer has no chat template, or the template takes no system prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        *,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
    ):
        if not tokenizer.has_chat_template:
            lacking = "This model's tokenizer has no chat template"
            remedy = "use mlx_flashhead.generate"
            raise ValueError(f"{lacking}, so it cannot hold a conversation: {remedy}.")
        self.model, self.tokenizer = model, tokenizer
        self.cache = FollowingCache(model, max_kv_size)
        self.answers: list[Answer] = []
        self._start = [] if system_prompt is None else [Message(role=SYSTEM, content=system_prompt)]
        self.messages: list[Message] = list(self._start)
        if self._start:
            self._tokens([*self._start, Message(role=USER, content="")])

    def reset(self) -> None:
        """Begins anew, with the system prompt."""
        self.messages = list(self._start)
        self.answers.clear()
        self.cache.clear()

    def replace(self, messages: list[Message]) -> None:
        """Continues another conversation, unless the chat template refuses it with a ValueError."""
        self._tokens([*messages, Message(role=USER, content="")])
        self.messages = list(messages)
        self.answers.clear()

    def ask(
        self, text: str, *, stopping: Callable[[], bool] = lambda: False, **kwargs: Any
    ) -> Iterator[str]:
        """Asks, streams the answer, and keeps it as the last of ``answers``.

        Args:
            text: The question.
            stopping: Called after each token and each piece of the prompt; True stops. The answer
                so far stays. A question without an answer is forgotten.
            **kwargs: Of ``stream_generate``, such as dense, max_tokens and sampler.

        Raises:
            ValueError: If the chat template refuses the conversation, which stays unchanged.
        """
        question = Message(role=USER, content=text)
        prompt = self._tokens([*self.messages, question])
        answer = Answer(n_prompt=len(prompt), n_cached=self.cache.follow(prompt))

        def progress(processed: int, total: int) -> None:
            if processed < total:  # at the end, the cache is a token ahead
                self.cache.token_ids = prompt[: answer.n_cached + processed]
                if stopping():
                    raise _Stopped

        stream = stream_generate(
            self.model,
            self.tokenizer,
            prompt[answer.n_cached :],
            logprobs=False,
            prompt_cache=self.cache.arrays,
            prompt_progress_callback=progress,
            **kwargs,
        )
        try:
            for response in stream:
                answer.n_tokens += 1
                if answer.n_tokens == 1:
                    self.cache.token_ids = list(prompt)
                else:
                    answer.tokens_per_second = response.generation_tps
                self.cache.token_ids.append(response.token)  # mlx-lm is a step ahead
                answer.text += response.text
                answer.finish = response.finish_reason or STOPPED
                if response.text:
                    yield response.text
                if stopping():
                    break
        except _Stopped:
            pass
        except BaseException:  # within a step: layers may hold different numbers of tokens
            self.cache.clear()
            raise
        finally:
            stream.close()
            if answer.text or answer.finish != STOPPED:
                self.messages += [question, Message(role=ASSISTANT, content=answer.text)]
                self.answers.append(answer)

    def _tokens(self, messages: list[Message]) -> list[int]:
        try:
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        except Exception as error:  # templates and their engine raise any type
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            refusal = "The model's chat template does not take this conversation"
            raise ValueError(f"{refusal} ({reason}).") from error
