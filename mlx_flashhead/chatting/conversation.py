"""A conversation with a model: its messages, and the prompt cache that follows them.

For each question all messages go through the tokenizer's chat template. The cache keeps the tokens
that it shares with the result, so the way in which an answer ended does not matter.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..common.new_folder import new_file
from ..decoding.drafting import new_draft_cache
from ..decoding.generation import stream_generate
from ..models.compat.mlx_lm import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from ..models.templates import apply_template
from ..models.trained_drafter import TrainedDrafter

LENGTH = "length"
STOPPED = "stopped"
# What is stored for the user's next start.
FILES = Path("~/.config/mlx_flashhead/chat")

# In the form of chat templates: a role, which is "system", "user" or "assistant", and a content.
Message = dict[str, str]


@dataclass
class ChatAnswer:
    """An answer of the model.

    Attributes:
        text: The text so far.
        n_prompt: The number of tokens of the conversation with the question.
        n_cached: Of these, the number of tokens that were in the cache already.
        n_tokens: The number of the answer's tokens.
        tokens_per_second: mlx-lm's measure, of two tokens or more.
        finish: "stopped" by the user, "stop" at an end-of-text token, "length" at the limit.
    """

    text: str = ""
    n_prompt: int = 0
    n_cached: int = 0
    n_tokens: int = 0
    tokens_per_second: float | None = None
    finish: str = STOPPED


class Conversation:
    """Questions and answers in turn, with any model and mlx-lm's wrapper of its tokenizer.

    The cache keeps ``max_kv_size`` tokens (default: all), the first four and the newest. A
    ``draft_model`` guesses the answers' next tokens, as of :func:`stream_generate`. ValueError if
    the tokenizer has no chat template, or the template takes no system prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
        draft_model: nn.Module | TrainedDrafter | None = None,
    ):
        if not tokenizer.has_chat_template:
            raise ValueError(
                "This model's tokenizer has no chat template, so it cannot hold a conversation: "
                "use mlx_flashhead.generate."
            )
        self.model = model
        self.tokenizer = tokenizer
        self._max_kv_size = max_kv_size
        self._draft_model = draft_model
        self._start: list[Message] = []
        if system_prompt is not None:
            self._start.append({"role": "system", "content": system_prompt})
        self.reset()

    def reset(self) -> None:
        """Begins anew, with the system prompt."""
        self.replace(self._start)
        self._clear_cache()

    def replace(self, messages: list[Message]) -> None:
        """Continues another conversation, unless the chat template refuses it with a ValueError."""
        if messages:
            self._tokens([*messages, {"role": "user", "content": ""}])
        self.messages = list(messages)
        self.answers: list[ChatAnswer] = []

    def ask(
        self, text: str, *, stopping: Callable[[], bool] = lambda: False, **kwargs: Any
    ) -> Iterator[str]:
        """Asks, streams the answer, and appends it to ``answers``; keywords of ``stream_generate``.

        ``stopping`` is called after each token, where True stops and the answer so far stays, and
        while the prompt is read, where it raises KeyboardInterrupt and the question is forgotten.
        ValueError if the chat template refuses the conversation, which stays unchanged.
        """
        question = {"role": "user", "content": text}
        prompt = self._tokens([*self.messages, question])
        answer = ChatAnswer(n_prompt=len(prompt), n_cached=self._trim_cache(prompt))

        def progress(processed: int, total: int) -> None:
            if processed < total and stopping():
                raise KeyboardInterrupt

        kwargs |= {"prompt_cache": self.cache, "prompt_progress_callback": progress}
        kwargs["draft_model"] = self._draft_model
        rest = prompt[answer.n_cached :]
        stream = stream_generate(self.model, self.tokenizer, rest, logprobs=False, **kwargs)
        self.cached_ids = list(prompt)
        try:
            for response in stream:
                answer.n_tokens += 1
                if answer.n_tokens > 1:
                    answer.tokens_per_second = response.generation_tps
                # The cache has this token, since mlx-lm is a step ahead.
                self.cached_ids.append(response.token)
                answer.text += response.text
                answer.finish = response.finish_reason or STOPPED
                if response.text:
                    yield response.text
                if stopping():
                    break
        except BaseException:
            # Amid a step, layers may hold different numbers of tokens.
            self._clear_cache()
            raise
        finally:
            stream.close()
            if answer.text or answer.finish != STOPPED:
                self.messages += [question, {"role": "assistant", "content": answer.text}]
                self.answers.append(answer)

    def _tokens(self, messages: list[Message]) -> list[int]:
        text = apply_template(self.tokenizer, messages, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _clear_cache(self) -> None:
        self.cache = make_prompt_cache(self.model, self._max_kv_size)
        if self._draft_model is not None:
            self.cache += new_draft_cache(self._draft_model, self._max_kv_size)
        # All tokens that were put in, also those that the cache has dropped.
        self.cached_ids = []

    def _trim_cache(self, prompt: list[int]) -> int:
        """Trims the cache to the beginning that ``prompt`` shares, without its last token."""
        limit = min(len(self.cached_ids), len(prompt) - 1)
        n_shared = 0
        while n_shared < limit and self.cached_ids[n_shared] == prompt[n_shared]:
            n_shared += 1
        n_too_many = len(self.cached_ids) - n_shared
        if n_too_many == 0:
            return n_shared
        if not can_trim_prompt_cache(self.cache):
            self._clear_cache()
            return 0
        trim_prompt_cache(self.cache, n_too_many)
        return n_shared


def read_conversation(
    path: Path, *, remedy: str = "choose a file written by /save"
) -> list[Message]:
    """Reads the messages in a file of ``write_conversation``, or in a list of them alone.

    Args:
        path: The file.
        remedy: What an error tells the user to do.

    Returns:
        The messages: a system prompt if there is one, then questions and answers in turn.

    Raises:
        ValueError: If the file does not hold such a conversation.
    """
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        listed = json.loads(path.read_bytes())
        if isinstance(listed, dict):
            listed = listed["messages"]
        messages = []
        for message in listed:
            messages.append({"role": message["role"], "content": message["content"]})
        roles = [message["role"] for message in messages]
        if roles[:1] == ["system"]:
            del roles[0]
        are_texts = all(isinstance(message["content"], str) for message in messages)
        questions = roles[0::2]
        answers = roles[1::2]
        in_turn = set(questions) <= {"user"} and set(answers) <= {"assistant"}
        if are_texts and in_turn and len(questions) == len(answers):
            return messages
    form = "JSON of questions and answers in turn"
    raise ValueError(f"{path} does not hold a conversation ({form}): {remedy}.")


def write_conversation(path: Path, messages: list[Message], model: str) -> None:
    """Writes the messages and the model's name as JSON, completely or not at all."""
    text = json.dumps({"model": model, "messages": messages}, indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def store_conversation(messages: list[Message], model: str) -> None:
    """Keeps the conversation for `last_conversation`."""
    folder = FILES.expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_conversation(folder / "last.json", messages, model)


def last_conversation() -> list[Message]:
    """The messages of the last conversation; a ValueError if there is none."""
    path = FILES.expanduser() / "last.json"
    if not path.exists():
        raise ValueError("There is no conversation to --resume: none has been kept yet.")
    return read_conversation(path, remedy="start without --resume")
