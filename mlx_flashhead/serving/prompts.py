"""Prompts: the tokens of a request's messages or texts, as many as the context has room for."""

from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..models.templates import apply_template
from .api_errors import TOO_LONG, ApiError
from .control_tokens import mark_control_tokens
from .requests import Request
from .served_models import ServedModel

PART = 4096  # characters that are tokenized at once to see whether a text is too long
MAX_TOKENS_PER_CUT = 16  # that a text has in addition if it is tokenized in two parts


@dataclass(frozen=True)
class Prompt:
    """A prompt of at least one token."""

    tokens: list[int]
    # lengths at which its cache is stored, since other prompts begin in the same way
    landmarks: tuple[int, ...] = ()
    state: str = "normal"  # of the text at the answer's beginning, or "reasoning"
    keep_space: bool = False  # whether a space at the answer's beginning is part of it


def read_prompts(request: Request) -> list[Prompt]:
    """The prompts of a request: one of a chat, one for each text."""
    served = request.served
    tokenizer = request.served.tokenizer
    if not request.chat:
        texts = [_tokens(served, prompt, "prompt") for prompt in request.prompts]
        return [Prompt(tokens, keep_space=True) for tokens in texts]
    messages = request.messages
    mark = None
    if request.escape_control_tokens:
        messages, mark = mark_control_tokens(messages, served.control_tokens)
    text = _render(request, messages)
    tokens = _tokens(served, text, "messages", mark, add_special_tokens=False)
    initial = getattr(tokenizer, "response_initial_state", None)  # 0.31 has no formats of answers
    state = initial or "normal"
    if tokenizer.has_thinking and not initial:
        begun = tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
        state = "reasoning" if begun else state
    landmarks: list[int] = []
    if not served.cuttable:  # the next prompt may lack this one's last tokens, as for a thought
        landmarks = [*_end_of_system(request, tokens), max(1, len(tokens) - 11)]
    return [Prompt(tokens, tuple(landmarks), state, keep_space=request.grammar is not None)]


def _render(request: Request, messages: list[dict[str, Any]], *, answer: bool = True) -> str:
    tokenizer = request.served.tokenizer
    if not tokenizer.has_chat_template:
        raise ApiError(
            "This model has no chat template: use /v1/completions, or start the server with "
            "--chat-template.",
            "messages",
        )
    settings = request.served.template_arguments | request.template_settings
    settings |= {"tools": request.tools.offered or None, "add_generation_prompt": answer}
    try:
        return apply_template(
            tokenizer, messages, remedy="send fewer or other messages", **settings
        )
    except ValueError as error:
        raise ApiError(str(error), "messages") from error


def _tokens(
    served: ServedModel,
    prompt: str | list[int],
    field: str,
    mark: str | None = None,
    **options: Any,
) -> list[int]:
    """The tokens of a prompt that the context has room for, of its pieces between marks."""
    encode = served.tokenizer.encode
    context = served.context
    tokens: Any = prompt
    n_least = 0  # tokens, as far as they have been counted
    if isinstance(prompt, str):
        pieces = [prompt] if mark is None else prompt.split(mark)
        text = "".join(pieces)
        # a tokenizer cannot be interrupted, so a long text is counted in parts first
        parts = range(0, len(text), PART) if len(text.encode()) >= context else ()
        for start in parts:
            n_least += len(encode(text[start : start + PART], add_special_tokens=False))
            n_least -= MAX_TOKENS_PER_CUT if start else 0
            if n_least > context:
                break
        else:
            tokens = [token for piece in pieces for token in encode(piece, **options)]
    if not tokens:
        raise ApiError("The prompt is empty: it needs at least one token.", field)
    if n_least > context or len(tokens) >= context:
        raise ApiError(
            f"The prompt is longer than this model's {context:,}-token context: shorten it.",
            field,
            code=TOO_LONG,
        )
    return tokens


def _end_of_system(request: Request, tokens: list[int]) -> list[int]:
    """How many tokens the prompt shares with others of the same system messages."""
    system = [*takewhile(lambda message: message["role"] == "system", request.messages)]
    if len(system) in (0, len(request.messages)):
        return []
    with suppress(ApiError):  # an answer does not need landmarks
        text = _render(request, [*system, {"role": "user", "content": ""}], answer=False)
        shared = request.served.tokenizer.encode(text, add_special_tokens=False)
        differ = (i for i, (a, b) in enumerate(zip(shared, tokens, strict=False)) if a != b)
        return [next(differ, 0)]
    return []
