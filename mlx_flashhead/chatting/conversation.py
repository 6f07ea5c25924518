"""A conversation with a model: its messages, and the prompt cache that follows them.

The messages are the truth. For each question all of them go through the tokenizer's chat template.
The cache keeps the tokens that it shares with the result, and the rest of it is trimmed. A cache
that cannot be trimmed is made anew. The way in which an answer ended therefore does not matter.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import mlx.nn as nn

from ..common.new_folder import new_file
from ..lossless.generation import stream_generate
from ..models.compat.mlx_lm import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from ..models.libraries import apply_template

LENGTH, STOPPED = "length", "stopped"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
KEY = "messages"


class Message(TypedDict):
    """One message in the form of chat templates."""

    role: str
    content: str


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
        text = apply_template(self.tokenizer, messages, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _checked(messages: object) -> list[Message]:
    """The messages of a conversation that continues with a question, without other fields."""
    if not isinstance(messages, list):
        raise ValueError(f"a conversation is a list of messages under the key {KEY!r}")
    checked = []
    for number, message in enumerate(messages, 1):
        match message:
            case {"role": str(role), "content": str(content)}:
                checked.append(Message(role=role, content=content))
            case _:
                raise ValueError(f"message {number} must have a role and a content, both of text")
    roles = [message["role"] for message in checked]
    turns = roles[1:] if roles[:1] == [SYSTEM] else roles
    if turns != [USER, ASSISTANT] * (len(turns) // 2):
        raise ValueError("its messages are not questions of a user and answers of an assistant")
    return checked


def read_conversation(
    path: Path, *, remedy: str = "choose a file written by /save"
) -> list[Message]:
    """Reads the messages of a file in the form of ``write_conversation``.

    Raises:
        ValueError: If it does not hold a conversation, with the ``remedy``.
    """
    try:
        content = json.loads(path.read_bytes())
        return _checked(content.get(KEY) if isinstance(content, dict) else content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        reason = "it is not JSON"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{path} does not hold a conversation ({reason}): {remedy}.")


def write_conversation(
    path: Path, messages: list[Message], model: str, *, replace: bool = False
) -> None:
    """Writes the messages and the model's name as JSON, completely or not at all.

    Raises:
        ValueError: If the file exists and is not a conversation, unless ``replace`` is true.
        OSError: If it cannot be written.
    """
    if path.exists() and not replace:
        try:
            read_conversation(path)
        except ValueError:
            reason = f"{path} exists already and is not a conversation: choose another name."
            raise ValueError(reason) from None
    text = json.dumps({"model": model, KEY: messages}, indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def kept_file(name: str) -> Path:
    """A file that a chat at the terminal keeps for its user from one start to the next."""
    return Path("~/.config/mlx_flashhead/chat", name).expanduser()


def keep(messages: list[Message], model: str) -> None:
    """Keeps a conversation as the last one."""
    path = kept_file("last.json")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_conversation(path, messages, model, replace=True)


def last_conversation() -> list[Message]:
    """The messages of the last conversation; a ValueError if there is none."""
    path = kept_file("last.json")
    if not path.exists():
        raise ValueError("There is no conversation to --resume: none has been kept yet.")
    return read_conversation(path, remedy="start without --resume")
