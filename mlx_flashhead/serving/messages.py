"""The messages of a chat, in the form that chat templates take."""

from typing import Any

from .api_errors import ApiError, field_error
from .strict_json import loads


def read_messages(
    messages: list[Any] | None, *, takes_developer: bool = False
) -> list[dict[str, Any]]:
    """Reads messages: each content becomes a text, the arguments of each call an object.

    Args:
        messages: The messages as the client sent them.
        takes_developer: Whether the template knows the role "developer". Otherwise it becomes
            "system", which OpenAI's name stands for.

    Raises:
        ApiError: If there is no message, or one has no role, or content that is not text.
    """
    read = []
    for i, message in enumerate(messages or [None]):
        where = f"messages[{i}]" if messages else "messages"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            example = '{"role": "user", "content": "…"}'
            raise ApiError(f"messages must be a list of at least one {example}.", where)
        message = {name: value for name, value in message.items() if value is not None}
        if message["role"] == "developer" and not takes_developer:
            message["role"] = "system"
        message["content"] = _text(message.get("content", ""), f"{where}.content")
        if "tool_calls" in message:
            message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        read.append(message)
    return read


def _text(content: Any, where: str) -> str:
    """A content, which may come as a list of parts, as one text."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    texts = []
    for part in parts:
        text = None
        if isinstance(part, dict) and part.get("type") == "text":
            text = part.get("text")
        if not isinstance(text, str):
            raise field_error(where, 'must be a text, or a list of {"type": "text", "text": "…"}.')
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message, with arguments as objects: templates write them as JSON."""
    read = []
    for call in calls if isinstance(calls, list) else [{}]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = "must be a list of calls, each with a function that has a name"
            raise field_error(where, f"{wanted}.")
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str):
                arguments = loads((arguments or "{}").encode())
        except ValueError as error:
            raise field_error(where, f"must have arguments in JSON, but {error}.") from None
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read
