"""Reads tool calls with a parser of mlx-lm: the work of a helper process (common/guarded.py)."""

import json
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_PACKAGE = "tool_parsers"


def work(request: list[Any]) -> str:
    """The JSON of what a parser reads.

    Args:
        request: mlx-lm's folder of parsers, the name of one, a text, and the tools of a request.
    """
    folder, name, text, tools = request
    if _PACKAGE not in sys.modules:
        # in a package of its own, since mlx_lm itself takes seconds to import
        package = ModuleType(_PACKAGE)
        package.__path__ = [folder]
        sys.modules[_PACKAGE] = package
    parser = import_module(f"{_PACKAGE}.{name}")
    return json.dumps(parser.parse_tool_call(text, tools))
