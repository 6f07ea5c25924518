"""Tool calls in a model's own words, read with mlx-lm's parsers within limits of time and memory.

Some parsers take the square of a text's length: seconds for a text that a model writes in seconds.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from ..common.guarded import Guard, GuardError

# Of a text with calls.
MAX_CHARACTERS = 1 << 18
_GUARD = Guard(Path(__file__).with_name("tool_call_parser.py"))
_PARSERS = "mlx_lm.tool_parsers."


def read_tool_calls(tokenizer: Any, text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls in a text that is marked as one.

    Args:
        tokenizer: mlx-lm's wrapper, which knows the parser.
        text: What stands between the marks of a call.
        tools: Those of the request, whose schemas give the arguments types.

    Returns:
        For each call its name, its arguments, and its id if it has one.

    Raises:
        ValueError: If the text is no call, or takes too much time, memory or length.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"A call of {len(text):,} characters is too long.")
    parser = tokenizer.tool_parser
    try:
        if parser.__module__.startswith(_PARSERS):
            path = Path(inspect.getfile(parser))
            name = parser.__module__.removeprefix(_PARSERS)
            read = json.loads(_GUARD.call([str(path.parent), name, text, tools]))
        else:
            read = parser(text, tools)
    except GuardError as error:
        raise ValueError(f"A call {error}.") from None
    # Parsers raise any type.
    except Exception as error:
        raise ValueError(f"The text is no call: {error}") from None
    if isinstance(read, list):
        return read
    return [read]
