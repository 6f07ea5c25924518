"""Formats that write the arguments of a call as one object or list: JSON, Python and others."""

import json
import keyword
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from .call_format import CallFormat, Tool
from .dialects import (
    BARE,
    function_gemma_dialect,
    gemma_dialect,
    json_dialect,
    python_dialect,
)
from .lark import literal, one_of, one_of_written
from .schemas import Plain, types_of
from .values import Brackets, ValueRules, string_regexes


class JsonTools(CallFormat):
    """``{"name": …, "arguments": {…}}`` between tags: Hermes, Qwen 2.5 and 3, and others."""

    start = "<tool_call>"
    end = "</tool_call>"
    names = r"[^\x00-\x1f\x7f]+"

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a JSON object with the tool's name and arguments."""
        return self._named_object(tool, self.end)

    def _named_object(self, tool: Tool, *forbidden: str, further: str = "") -> str | None:
        arguments = self._json_object(tool, *forbidden)
        name = json.dumps(tool.name, ensure_ascii=False)
        if arguments is None or any(mark in name for mark in forbidden):
            return None
        json_marks = self._values(tool, json_dialect()).json_brackets()
        colon = json_marks.colon
        comma = json_marks.comma
        return (
            f"{json_marks.opening} {literal(json.dumps('name'))} {colon} {literal(name)} {comma} "
            f"{literal(json.dumps('arguments'))} {colon} {arguments} {further} {json_marks.closing}"
        )

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a section, which has a single call."""
        return f"{self._padding()} {call} {self._padding()} {self.marks.expression(self.end)}"


class Mistral(JsonTools):
    """``name[ARGS]{…}``, or a list of JSON. The end of the answer ends it."""

    start = "[TOOL_CALLS]"
    end = ""
    several_in_section = True
    names = r"[^\x00-\x1f\x7f]+"

    def section(self, tools: Sequence[Tool], *, several: bool) -> str:
        """Returns a Lark expression of calls with headers, or of a list of calls."""
        with_header = [tool for tool in tools if re.fullmatch(r"[\w-]+", tool.name, re.ASCII)]
        listed = super().section(tools, several=several)
        headed = [self.rules.rule(self._headed(tool) or "") for tool in with_header]
        if not headed:
            return listed
        any_headed = self.rules.rule(one_of(headed))
        again = f"({self.marks.expression(self.start)}? {any_headed})*" if several else ""
        return one_of([listed, f"{any_headed} {again}"])

    def _headed(self, tool: Tool) -> str | None:
        arguments = self._json_object(tool)
        return f"{self.marks.expression(f'{tool.name}[ARGS]')} {arguments}"

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call in a list, whose identifier may be left out."""
        comma = self.rules.terminal([json_dialect().comma])
        colon = self.rules.terminal([json_dialect().colon])
        number = self.rules.terminal(['"[A-Za-z0-9]{9}"'])
        identifier = f"({comma} {literal(json.dumps('id'))} {colon} {number})?"
        return self._named_object(tool, further=identifier)

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a list of calls."""
        space = self._padding()
        comma = self.rules.terminal([json_dialect().comma])
        return f"{space} {self._list(call, comma, several=several)}"


class KimiK2(CallFormat):
    """``functions.name:0`` and JSON, between tokens of their own."""

    start = "<|tool_calls_section_begin|>"
    end = "<|tool_calls_section_end|>"
    names = r"[^\s\"'<>&\[\]{}|:=\\]+"
    several_in_section = True

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        arguments = self._json_object(tool, "<|tool_call_end|>", self.end)
        expression = self.marks.expression
        number = self.rules.terminal(["[0-9]{1,3}"])
        if arguments is None:
            return None
        return (
            f"{expression(f'<|tool_call_begin|>functions.{tool.name}:')} {number} "
            f"{expression('<|tool_call_argument_begin|>')} {arguments} "
            f"{expression('<|tool_call_end|>')}"
        )


class KimiK3(CallFormat):
    """Elements of XML whose angle brackets are tokens, with the type of each argument."""

    start = "<|open|>tools<|sep|>"
    end = "<|close|>tools<|sep|>"
    names = r"[^\s\"<>&|]+"
    several_in_section = True
    _FORBIDDEN = ("<|open|>", "<|close|>", "<|sep|>")

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        values = self._values(tool, json_dialect(*self._FORBIDDEN))
        bodies = []
        for plain in self._objects(tool):
            if plain.get("properties") or plain.get("required"):
                bodies.append(self._arguments(plain, values))
            else:
                raw = values.any_of([plain])
                opening = self.marks.expression('<|open|>json type="object"<|sep|>')
                closing = self.marks.expression("<|close|>json<|sep|>")
                bodies.append(None if raw is None else f"{opening} {raw} {closing}")
        body = one_of_written(bodies)
        if body is None:
            return None
        number = self.rules.terminal(["[0-9]{1,3}"])
        opening = self.marks.expression(f'<|open|>call tool="{tool.name}" index="')
        closing = self.marks.expression("<|close|>call<|sep|>")
        middle = self.marks.expression('"<|sep|>')
        return f"{opening} {number} {middle} {body} {closing}"

    def _arguments(self, plain: Plain, values: ValueRules) -> str | None:
        arguments = self._in_sequence(plain, partial(self._argument, values=values))
        return None if arguments is None else self._joined(arguments)

    def _argument(self, name: str, schema: Any, values: ValueRules) -> str | None:
        if not re.fullmatch(self.names, name):
            return None
        closing = "<|close|>argument<|sep|>"
        written = []
        for plain in values.schemas.alternatives(schema):
            for kind, value in self._typed(plain, closing, values):
                opening = f'<|open|>argument key="{name}" type="{kind}"<|sep|>'
                written.append(f"{self.marks.expression(opening)} {value}")
        return one_of(written) if written else None

    def _typed(self, plain: Plain, closing: str, values: ValueRules) -> list[tuple[str, str]]:
        """The types and the values with their end, of a plain schema."""
        end = self.marks.expression(closing)
        if plain.get("type") == "string":
            inside = string_regexes(plain, BARE)
            if inside is None:
                return []
            forbidden = self._FORBIDDEN
            string = self.marks.text_until(self.rules, closing, inside, forbidden=forbidden)
            return [("string", string)]
        if "enum" not in plain:
            expression = values.any_of([plain])
            return [] if expression is None else [(plain["type"], f"{expression} {end}")]
        found = []
        for value in plain["enum"]:
            text = value if isinstance(value, str) else values.dialect.written(value)
            if text is not None and values.dialect.allows(text):
                (kind,) = types_of({"enum": [value]})
                found.append((kind, f"{self.marks.expression(text)} {end}"))
        return found


class Gemma4(CallFormat):
    """``call:name{key:value}``, with strings between marks instead of quotes."""

    start = "<|tool_call>"
    end = "<tool_call|>"
    names = r"[\w-]+"

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        arguments = self._values(tool, gemma_dialect(self.end)).any_of(self._objects(tool))
        return None if arguments is None else f"{literal(f'call:{tool.name}')} {arguments}"


class FunctionGemma(CallFormat):
    """``call:name{key:value}``, without objects and without lists of several elements."""

    start = "<start_function_call>"
    end = "<end_function_call>"
    names = r"\w+"

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        values = self._values(tool, function_gemma_dialect("}", self.end))
        brackets = Brackets(literal("{"), literal(","), literal(":"), literal("}"))
        arguments = self._members(tool, values, brackets, self._key)
        return None if arguments is None else f"{literal(f'call:{tool.name}')} {arguments}"

    @staticmethod
    def _key(name: str) -> str | None:
        return name if re.fullmatch(r"[^:{}<,]+", name) else None


class Pythonic(CallFormat):
    """A list of calls of Python: ``[name(key=value)]``."""

    start = "<|tool_call_start|>"
    end = "<|tool_call_end|>"
    names = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
    several_in_section = True

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written.

        Raises:
            ValueError: If the name has a word of Python.
        """
        if any(keyword.iskeyword(part) for part in tool.name.split(".")):
            raise ValueError(
                "its name is a keyword of Python, in whose syntax this model writes calls"
            )
        values = self._values(tool, python_dialect(self.end))
        comma = self.rules.terminal([",[ ]?"])
        brackets = Brackets(literal("("), comma, literal("="), literal(")"))
        arguments = self._members(tool, values, brackets, self._key)
        return None if arguments is None else f"{literal(tool.name)} {arguments}"

    @staticmethod
    def _key(name: str) -> str | None:
        is_name = re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and not keyword.iskeyword(name)
        return name if is_name else None

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a Python list of calls."""
        comma = self.rules.terminal([",[ ]?"])
        listed = self._list(call, comma, several=several)
        return f"{listed} {self.marks.expression(self.end)}"
