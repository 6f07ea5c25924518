"""The tools of a request, and how its answer may call them."""

import json
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..structured.tool_formats import format_name_of
from ..structured.tool_grammar import ToolCalls, tool_calls, tools_for_parser
from ..structured.vocabulary import vocabulary_of
from .api_errors import ApiError, field_error
from .served_models import ServedModel

# Characters of all tools together, as JSON.
MAX_TOOL_CHARACTERS = 400_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestedTools:
    """The tools of a request.

    Attributes:
        offered: Those that the chat template shows to the model.
        for_parser: The same as mlx-lm's parser must see them.
        calls: What a call looks like; None if calls are free, or there are no tools.
        required: Whether the answer must be a call.
    """

    offered: list[dict[str, Any]]
    for_parser: list[dict[str, Any]]
    calls: ToolCalls | None = None
    required: bool = False


def read_tools(
    tools: list[Any], choice: Any, served: ServedModel, *, several: bool
) -> RequestedTools:
    """The tools of a request, as far as its ``tool_choice`` allows them.

    Raises:
        ApiError: If a tool is wrong, or a call of it cannot be followed in the model's format.
    """
    _check_tools(tools, served)
    allowed, required = _chosen(choice, tools)
    if not allowed:
        return RequestedTools([], [])
    try:
        vocabulary_of(served.tokenizer)
        format_name_of(served.tokenizer)
    except ValueError as error:
        # llguidance, a fast tokenizer or a format that is known is missing.
        if required:
            raise ApiError(f"tool_choice cannot be followed: {error}", "tool_choice") from None
        _tell_once(served.name, str(error))
        return RequestedTools(tools, tools)
    try:
        calls = tool_calls(served.tokenizer, allowed, several=several)
        views = tools_for_parser(served.tokenizer, tools)
    except ValueError as error:
        raise ApiError(f"tools: {error}", "tools") from None
    return RequestedTools(tools, views, calls, required)


@cache
def _tell_once(name: str, reason: str) -> None:
    logger.warning("Calls of tools by %s follow no schema: %s", name, reason)


def _check_tools(tools: list[Any], served: ServedModel) -> None:
    names = set()
    for i, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type") == "function"
        name = _name_of(tool)
        if not (is_function and "function" in tool and isinstance(name, str) and name):
            wanted = '{"type": "function", "function": …}, whose function has a name'
            raise ApiError(f"tools[{i}] must be {wanted}.", "tools")
        if not isinstance(tool["function"].get("parameters") or {}, dict):
            raise ApiError(f"tools[{i}].function.parameters must be a JSON schema.", "tools")
        if name in names:
            raise ApiError(f"tools[{i}] has the name of another tool.", "tools")
        names.add(name)
    if tools and not served.tokenizer.has_tool_calling:
        raise ApiError("This model's chat template knows no tools: leave them out.", "tools")
    if tools and len(json.dumps(tools)) > MAX_TOOL_CHARACTERS:
        raise field_error(
            "tools", f"are longer than {MAX_TOOL_CHARACTERS:,} characters: send fewer."
        )


def _chosen(choice: Any, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The tools that may be called, and whether one must be."""
    allowed = tools
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        # Responses have the list in the choice itself.
        described = choice.get("allowed_tools")
        if not isinstance(described, dict):
            described = choice
        listed = described.get("tools")
        if not isinstance(listed, list):
            listed = []
        allowed = _named([_name_of(tool) for tool in listed], tools)
        choice = described.get("mode", "auto")
    elif isinstance(choice, dict):
        allowed = _named([_name_of(choice)], tools)
        choice = "required"
    if choice not in ("none", "auto", "required", "any"):
        wanted = '"none", "auto", "required", or {"type": "function", "function": {"name": …}}'
        raise field_error("tool_choice", f"must be {wanted}.")
    if choice == "none":
        return [], False
    required = choice != "auto"
    if required and not tools:
        raise field_error("tool_choice", "asks for a call, and there are no tools.")
    return allowed, required


def _name_of(choice: Any) -> Any:
    """The name in ``{"type": "function", "function": {"name": …}}``."""
    if not isinstance(choice, dict):
        return None
    function = choice.get("function", choice)
    if not isinstance(function, dict):
        return None
    return function.get("name")


def _named(names: list[Any], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {tool["function"]["name"]: tool for tool in tools}
    if not names or not all(isinstance(name, str) and name in known for name in names):
        known_names = ", ".join(known) or "there are none"
        raise field_error("tool_choice", f"must name some of the tools: {known_names:.100}.")
    return [known[name] for name in names]
