"""Prompts: the tokens of a request's messages or texts, as many as the context has room for."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..models.templates import apply_template
from .api_errors import TOO_LONG, ApiError
from .control_tokens import mark_control_tokens
from .requests import Request
from .served_models import ServedModel

# So many characters are tokenized at once to see whether a text is too long.
PART = 4096
# A text that is tokenized in two parts has so many tokens more at most.
MAX_TOKENS_PER_CUT = 16


@dataclass(frozen=True)
class Prompt:
    """A prompt of at least one token.

    Attributes:
        tokens: Its tokens.
        landmarks: Lengths at which its cache is stored, since other prompts begin in the same way.
        state: That of the text at the answer's beginning, "normal" or "reasoning".
        keep_space: Whether a space at the answer's beginning is part of it.
    """

    tokens: list[int]
    landmarks: tuple[int, ...] = ()
    state: str = "normal"
    keep_space: bool = False


def read_prompts(request: Request) -> list[Prompt]:
    """The prompts of a request: one of a chat, one for each text."""
    served = request.served
    if not request.chat:
        prompts = []
        for prompt in request.prompts:
            tokens = _tokens(served, prompt, "prompt")
            prompts.append(Prompt(tokens, keep_space=True))
        return prompts
    messages = request.messages
    mark = None
    if request.escape_control_tokens:
        messages, mark = mark_control_tokens(messages, served.control_tokens)
    text = _render(request, messages)
    tokens = _tokens(served, text, "messages", mark, add_special_tokens=False)
    landmarks: list[int] = []
    if not served.cuttable:
        # The next prompt may lack this one's last tokens, as where a thought is left out.
        landmarks = [*_end_of_system(request, tokens), max(1, len(tokens) - 11)]
    return [
        Prompt(
            tokens,
            tuple(landmarks),
            state=_initial_state(served.tokenizer, tokens),
            keep_space=request.grammar is not None,
        )
    ]


def _initial_state(tokenizer: Any, tokens: list[int]) -> str:
    """The state of the text at the beginning of the answer to a chat, in mlx-lm's words."""
    # mlx-lm 0.31 has no formats of answers.
    initial = getattr(tokenizer, "response_initial_state", None)
    if initial:
        return initial
    if not tokenizer.has_thinking:
        return "normal"
    if tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens):
        return "reasoning"
    return "normal"


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
    too_long = ApiError(
        f"The prompt is longer than this model's {served.context:,}-token context: shorten it.",
        field,
        code=TOO_LONG,
    )
    tokens: list[int] = []
    if not isinstance(prompt, str):
        tokens = prompt
    else:
        pieces = [prompt]
        if mark is not None:
            pieces = prompt.split(mark)
        if _is_longer_than_context("".join(pieces), served):
            raise too_long
        for piece in pieces:
            tokens += served.tokenizer.encode(piece, **options)
    if not tokens:
        raise ApiError("The prompt is empty: it needs at least one token.", field)
    if len(tokens) >= served.context:
        raise too_long
    return tokens


def _is_longer_than_context(text: str, served: ServedModel) -> bool:
    """Whether a text certainly has more tokens than the context.

    A tokenizer cannot be interrupted, so a long text is counted in parts.
    """
    if len(text.encode()) < served.context:
        return False
    n_least = 0
    for start in range(0, len(text), PART):
        part = text[start : start + PART]
        n_least += len(served.tokenizer.encode(part, add_special_tokens=False))
        if start > 0:
            n_least -= MAX_TOKENS_PER_CUT
        if n_least > served.context:
            return True
    return False


def _end_of_system(request: Request, tokens: list[int]) -> list[int]:
    """How many tokens the prompt shares with others of the same system messages."""
    system = [*takewhile(lambda message: message["role"] == "system", request.messages)]
    if len(system) in (0, len(request.messages)):
        return []
    try:
        text = _render(request, [*system, {"role": "user", "content": ""}], answer=False)
    except ApiError:
        # An answer does not need landmarks.
        return []
    other = request.served.tokenizer.encode(text, add_special_tokens=False)
    for i, (theirs, own) in enumerate(zip(other, tokens, strict=False)):
        if theirs != own:
            return [i]
    return [0]
