"""From a request to tokens: chat templates, the tokenizer, and the limit of the context."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ...common.time_limit import time_limit
from ..protocol.api_error import ApiError
from ..protocol.requests import Request
from ..served_models import ServedModel

RENDER_SECONDS = 5.0
# The tokens that begin a thought are searched within this distance of a prompt's end.
_THOUGHT_TAIL = 11


@dataclass(frozen=True)
class Prompt:
    """A prompt of at least one token."""

    tokens: list[int]
    # lengths at which its cache is kept, since other prompts begin in the same way
    landmarks: tuple[int, ...] = ()
    state: str = "normal"  # of the text at the answer's beginning, or "reasoning"
    keep_space: bool = False  # whether a space at the answer's beginning is part of it


def read_prompts(request: Request) -> list[Prompt]:
    """The prompts of a request: one of a chat, one for each text."""
    if request.chat:
        return [_chat_prompt(request)]
    texts = [_tokens(request.served, prompt, "prompt") for prompt in request.prompts]
    return [Prompt(tokens, keep_space=True) for tokens in texts]


def _chat_prompt(request: Request) -> Prompt:
    served = request.served
    text = _render(request, request.messages)
    tokens = _tokens(served, text, "messages", add_special_tokens=False)
    landmarks: tuple[int, ...] = ()
    if not served.cuttable:
        landmarks = (*_end_of_system(request, tokens), _start_of_thought(served, tokens))
    return Prompt(tokens, landmarks, _state(served, tokens), keep_space=request.form is not None)


def _render(request: Request, messages: list[dict[str, Any]], *, answer: bool = True) -> str:
    tokenizer = request.served.tokenizer
    if not tokenizer.has_chat_template:
        remedy = "use /v1/completions, or start the server with --chat-template"
        raise ApiError(f"This model has no chat template: {remedy}.", "messages")
    limit = f"within {RENDER_SECONDS:g} seconds"
    too_slow = ApiError(f"The chat template did not end {limit}: send fewer messages.", "messages")
    try:
        with time_limit(RENDER_SECONDS, too_slow):
            return tokenizer.apply_chat_template(
                messages,
                tools=request.tools or None,
                add_generation_prompt=answer,
                tokenize=False,
                **(request.served.template_arguments | request.template_settings),
            )
    except ApiError:
        raise
    except Exception as error:  # templates raise any type
        reason = str(error) or type(error).__name__
        raise ApiError(f"The chat template cannot be filled in: {reason}", "messages") from error


def _tokens(served: ServedModel, prompt: str | list[int], field: str, **options: Any) -> list[int]:
    """The tokens of a prompt that the context has room for."""
    length = f"more than {served.context:,}"
    if isinstance(prompt, str) and len(prompt) <= served.context * served.longest_token:
        prompt = served.tokenizer.encode(prompt, **options)
    if not isinstance(prompt, str):  # which is too long, whatever its tokens are
        if not prompt:
            raise ApiError("The prompt is empty: it needs at least one token.", field)
        if len(prompt) < served.context:
            return prompt
        length = f"{len(prompt):,}"
    most = f"at most {served.context - 1:,} are read"
    reason = f"since the answer needs one of the context's {served.context:,}"
    refusal = f"The prompt has {length} tokens, and {most}, {reason}: send less."
    raise ApiError(refusal, field, code="context_length_exceeded")


def _end_of_system(request: Request, tokens: list[int]) -> list[int]:
    """How many tokens the prompt shares with others of the same system messages."""
    system = [*takewhile(lambda message: message["role"] == "system", request.messages)]
    if len(system) in (0, len(request.messages)):
        return []
    other = [*system, {"role": "user", "content": ""}]
    try:
        text = _render(request, other, answer=False)
    except ApiError:
        return []  # an answer does not need landmarks
    shared = request.served.tokenizer.encode(text, add_special_tokens=False)
    differ = (i for i, (a, b) in enumerate(zip(shared, tokens, strict=False)) if a != b)
    return [next(differ, 0)]


def _start_of_thought(served: ServedModel, tokens: list[int]) -> int:
    """The prompt's length before the thought that its end begins. The next prompt lacks it."""
    tokenizer = served.tokenizer
    if tokenizer.has_thinking:
        start = tokenizer.rfind_think_start(tokens, start=len(tokens) - _THOUGHT_TAIL)
        if start >= 0:
            return start
    return len(tokens) - 1


def _state(served: ServedModel, tokens: list[int]) -> str:
    tokenizer = served.tokenizer
    if tokenizer.response_initial_state:
        return tokenizer.response_initial_state
    if not tokenizer.has_thinking:
        return "normal"
    thinks = tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
    return "reasoning" if thinks else "normal"
