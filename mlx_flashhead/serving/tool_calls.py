"""Calls of tools, from what a model writes to what OpenAI's API has."""

import uuid
from typing import Any

from .requests import Request
from .valid_json import dumps


class ToolCalls:
    """Reads the calls of one answer.

    Args:
        request: Which names the tools, or none.
    """

    def __init__(self, request: Request):
        self._tools = request.tools
        self._parse = request.served.tokenizer.tool_parser
        self._unread = ""

    def read(self, text: str) -> list[dict[str, Any]]:
        """The calls in what a model has written as one; usually a single one.

        What is no call, or was not asked for, becomes part of the text of the answer.
        """
        if not self._tools:
            self._unread += text
            return []
        try:
            parsed = self._parse(text, self._tools)
            parsed = parsed if isinstance(parsed, list) else [parsed]
            return [_call(one) for one in parsed]
        except Exception:  # mlx-lm's parsers of models' formats raise whatever they meet
            self._unread += text
            return []

    def unread(self) -> str:
        """What was read as a call and is none, once."""
        text, self._unread = self._unread, ""
        return text


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": parsed.get("id") or f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": parsed["name"], "arguments": dumps(parsed["arguments"])},
    }
