"""Calls of tools, from a model's text to the form of OpenAI's API."""

import uuid
from typing import Any

from .requests import Request
from .valid_json import dumps


class ToolCalls:
    """Reads the calls of one answer.

    Args:
        request: The request, which may name tools.
    """

    def __init__(self, request: Request):
        self._tools = request.tools
        self._parse = request.served.tokenizer.tool_parser
        self._unread = ""

    def read(self, text: str) -> list[dict[str, Any]]:
        """The calls in a text that a model has marked as a call; usually one.

        A text that is not a call, or that the request does not allow, becomes part of the answer.
        """
        if not self._tools:
            self._unread += text
            return []
        try:
            parsed = self._parse(text, self._tools)
            parsed = parsed if isinstance(parsed, list) else [parsed]
            return [_call(one) for one in parsed]
        except Exception:  # mlx-lm's parsers raise any type
            self._unread += text
            return []

    def unread(self) -> str:
        """The text that was read as a call but is not one. Given out once."""
        text, self._unread = self._unread, ""
        return text


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": parsed.get("id") or f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": parsed["name"], "arguments": dumps(parsed["arguments"])},
    }
