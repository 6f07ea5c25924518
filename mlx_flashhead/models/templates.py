"""Prompts by the chat template of a tokenizer, within limits of time and memory."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..common.guarded import Guard, GuardError
from .compat.tokenizers import has_function_for_template, inner_tokenizer

_GUARD = Guard(Path(__file__).with_name("template_renderer.py"))


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a request: as a chat, or as a text where the model has no turns.

    Args:
        tokenizer: The model's tokenizer.
        text: The request.
    """
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def apply_template(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    continue_final_message: bool = False,
    remedy: str = "change the messages",
    **options: Any,
) -> str:
    """Fills in the chat template of mlx-lm's or transformers' tokenizer.

    Args:
        tokenizer: The tokenizer.
        messages: The conversation.
        continue_final_message: Leave the last message open, so that the model goes on with it.
        remedy: What the error advises.
        options: Those of transformers, such as ``tools``, and variables of the template.

    Returns:
        The text that the template makes of the messages.

    Raises:
        ValueError: If the template fails, or takes more than 5 seconds or 512 MB.
    """
    apply = partial(type(tokenizer).apply_chat_template, tokenizer, messages, tokenize=False)
    template = _jinja_template(tokenizer, options.get("tools"))
    # Templates raise any type.
    try:
        if template is not None:
            # transformers prepares messages, tools and variables, and writes those that are read.
            variables = apply(chat_template=_writing_variables(template), **options)
            text = _GUARD.call([template, f'{{{variables}"":0}}'])
            if not continue_final_message:
                return text
        if continue_final_message:
            # What the template makes is bounded above.
            return apply(continue_final_message=True, **options)
        return apply(**options)
    except Exception as error:
        line = str(error).strip().split("\n")[0].rstrip(".")[:200]
        if not line:
            line = type(error).__name__
        if isinstance(error, GuardError):
            line = f"it {line}"
        raise ValueError(
            f"The model's chat template cannot be filled in ({line}): {remedy}."
        ) from error


def question_text(
    tokenizer: Any,
    question: str,
    *,
    system_prompt: str | None = None,
    prefill: str | None = None,
    remedy: str = "change the question",
    variables: dict[str, Any] | None = None,
) -> str:
    """Fills in the chat template for a user's question.

    Args:
        tokenizer: mlx-lm's tokenizer.
        question: The user's text.
        system_prompt: Comes before it.
        prefill: The beginning of the answer, which the model continues.
        remedy: What the error advises.
        variables: Of the template.

    Returns:
        The text of the prompt.

    Raises:
        ValueError: As :func:`apply_template`.
    """
    messages = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    messages.append({"role": "user", "content": question})
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    return apply_template(
        tokenizer,
        messages,
        remedy=remedy,
        continue_final_message=prefill is not None,
        add_generation_prompt=prefill is None,
        **(variables or {}),
    )


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Names of the variables that a tokenizer's chat template reads, as far as it is Jinja's."""
    template = _jinja_template(tokenizer, None)
    if template is None:
        return frozenset()
    try:
        return frozenset(_variables_read(template))
    # The error is raised when it is filled in.
    except (GuardError, RuntimeError):
        return frozenset()


def _writing_variables(template: str) -> str:
    """A template that writes the variables that another one reads, as members of JSON."""
    entries = []
    for name in _variables_read(template):
        entries.append(
            f'{{% if {name} is defined %}}"{name}":{{{{ {name}|tojson }}}},{{% endif %}}'
        )
    if not entries:
        return " "
    return "".join(entries)


@lru_cache(32)
def _variables_read(template: str) -> tuple[str, ...]:
    """Names of the variables that a template reads."""
    return tuple(_GUARD.call([template]))


def _jinja_template(tokenizer: Any, tools: Any) -> str | None:
    """The template; None where code of mlx-lm or of the model is in its place."""
    if has_function_for_template(tokenizer):
        return None
    inner = inner_tokenizer(tokenizer)
    apply = getattr(type(inner), "apply_chat_template", None)
    if apply is not PreTrainedTokenizerBase.apply_chat_template or not inner.chat_template:
        return None
    return inner.get_chat_template(tools=tools)
