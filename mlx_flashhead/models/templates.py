"""Prompts by the chat template of a tokenizer, within limits of time and memory."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from ..common.guarded import Guard, GuardError

_GUARD = Guard(Path(__file__).with_name("template_renderer.py"))


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    """A request as a chat, or as a text where the model has no turns."""
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
    """The text that the chat template of mlx-lm's or transformers' tokenizer makes of messages.

    ``options`` are transformers', such as ``tools``, and variables of the template. ValueError,
    which advises the ``remedy``, if the template fails, or takes more than 5 seconds or 512 MB.
    """
    apply = partial(type(tokenizer).apply_chat_template, tokenizer, messages, tokenize=False)
    template = _jinja_template(tokenizer, options.get("tools"))
    text = ""
    try:
        if template is not None:
            # transformers prepares messages, tools and variables, and writes what is read of them
            written = "".join(
                f'{{% if {name} is defined %}}"{name}":{{{{ {name}|tojson }}}},{{% endif %}}'
                for name in _GUARD.call([template])
            )
            variables = apply(chat_template=written or " ", **options)
            text = _GUARD.call([template, f'{{{variables}"":0}}'])
        if template is None or continue_final_message:  # with what it makes bounded above
            options |= {"continue_final_message": True} if continue_final_message else {}
            text = apply(**options)
    except Exception as error:  # templates raise any type
        said = str(error).strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__
        said = f"it {said}" if isinstance(error, GuardError) else said
        refusal = "The model's chat template cannot be filled in"
        raise ValueError(f"{refusal} ({said}): {remedy}.") from error
    return text


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Names of the variables that a tokenizer's chat template reads, as far as it is Jinja's."""
    template = _jinja_template(tokenizer, None)
    try:
        return frozenset() if template is None else frozenset(_GUARD.call([template]))
    except (GuardError, RuntimeError):  # said when it is filled in
        return frozenset()


def _jinja_template(tokenizer: Any, tools: Any) -> str | None:
    """The template; None where code of mlx-lm or of the model is in its place."""
    inner = tokenizer
    if isinstance(tokenizer, TokenizerWrapper):
        if tokenizer._chat_template is not None:
            return None
        inner = tokenizer._tokenizer
    apply = getattr(type(inner), "apply_chat_template", None)
    if apply is not PreTrainedTokenizerBase.apply_chat_template or not inner.chat_template:
        return None
    return inner.get_chat_template(tools=tools)
