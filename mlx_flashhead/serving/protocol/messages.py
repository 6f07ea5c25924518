"""What a request brings to an answer: a chat's messages, tools and settings, or texts."""

from typing import Any

from .api_error import ApiError, loads, wrong

_EXAMPLE = 'messages must be a list of at least one {"role": "user", "content": "…"}.'
_MAX_SETTING = 1000  # characters


def read_messages(messages: list[Any] | None) -> list[dict[str, Any]]:
    """The messages in the form of chat templates: each content a text, each argument an object."""
    if not messages:
        raise ApiError(_EXAMPLE, "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_template_settings(settings: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The settings of a chat template that takes the ``known`` names. Values must be plain."""
    field = "chat_template_kwargs"
    for name, value in settings.items():
        plain = isinstance(value, bool | int | float | str)
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            reason = f"is not a setting of this model's chat template, which takes: {takes}."
        elif not plain or (isinstance(value, str) and len(value) > _MAX_SETTING):
            most = f"a text of at most {_MAX_SETTING:,} characters"
            reason = f"must be true, false, a number or {most}."
        elif not isinstance(value, str) and abs(value) > 1e9:
            reason = "is too large."
        else:
            continue
        raise ApiError(f"{field}.{name[:40]} {reason}", field)
    return settings


def read_tools(tools: list[Any], choice: Any, *, known: bool) -> list[dict[str, Any]]:
    """The tools that may be called, by a model whose template has them if ``known``."""
    if choice not in ("auto", "none"):
        raise wrong("tool_choice", 'must be "auto" or "none": a call cannot be forced.')
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise ApiError(f'tools[{i}] must be {{"type": "function", "function": …}}.', "tools")
        if not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise ApiError(f"tools[{i}].function must be an object with a name.", "tools")
    if tools and not known:
        raise ApiError("This model's chat template knows no tools: leave them out.", "tools")
    return tools if choice == "auto" else []


def read_texts(prompts: Any, vocab_size: int) -> list[str | list[int]]:
    """The texts or token ids to continue."""
    if isinstance(prompts, str) or (prompts and _are_tokens(prompts)):
        prompts = [prompts]
    sound = isinstance(prompts, list) and prompts
    if not sound or not all(isinstance(prompt, str) or _are_tokens(prompt) for prompt in prompts):
        raise wrong("prompt", "must be a text, a list of texts, or token ids.")
    last = vocab_size - 1
    tokens = (token for prompt in prompts if not isinstance(prompt, str) for token in prompt)
    if not all(0 <= token <= last for token in tokens):
        raise wrong("prompt", f"holds a token that this model does not have: choose 0 to {last}.")
    return prompts


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(_EXAMPLE, where)
    message = {name: value for name, value in message.items() if value is not None}
    for name in ("audio", "function_call"):  # of OpenAI's, which no template reads
        if name in message:
            raise wrong(f"{where}.{name}", "is not read here: leave it out.")
    message["content"] = _text(message.get("content", ""), f"{where}.content")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return message


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "must be a text, or a list of parts with text.")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise wrong(f"{where}[{i}]", "must be text.")
        if not isinstance(part.get("text"), str):
            raise ApiError(f"{where}[{i}].text must be a text.", f"{where}[{i}]")
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls, with arguments as objects: templates write them as JSON themselves."""
    if not isinstance(calls, list):
        raise wrong(where, "must be a list.")
    read = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where}[{i}].function must be an object with a name.", where)
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str):
                arguments = loads((arguments or "{}").encode())
        except ValueError as error:
            reason = f"{where}[{i}].function.arguments must be JSON, but {error}."
            raise ApiError(reason, where) from None
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read
