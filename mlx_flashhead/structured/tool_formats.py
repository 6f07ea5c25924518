"""The formats in which models write calls of tools: one for each of mlx-lm's tool parsers.

A format is a grammar of what the parser reads: each text of it becomes a call whose arguments
follow the tool's schema. What a format cannot carry, such as its own end mark within a string, is
left out.
"""

import json
import keyword
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from .dialects import (
    BARE,
    Dialect,
    FormatMarks,
    function_gemma_dialect,
    gemma_dialect,
    json_dialect,
    python_dialect,
)
from .lark import LarkRules, literal, one_of
from .regexes import containing, quoted_regex
from .schemas import Plain, Schemas, listed_properties, types_of
from .values import Brackets, ValueRules, string_regexes

# Strings without quotes beside JSON's values: what no reader takes for a literal.
_BARE_WORD = r"""[A-Za-z]([^'"()\[\]{}\\<>\x00-\x1f\x7f]{0,80}[^'"()\[\]{}\\<>\x00-\x1f\x7f\s])?"""
_LITERAL = "(?i:true|false|null|none|nan|infinity|inf|nil|yes|no|on|off)([^A-Za-z0-9_](?s:.*))?"
_WITHOUT_SPACE_AROUND = r"([^\s\x1c-\x1f]((?s:.*)[^\s\x1c-\x1f])?)?"
_CDATA = ("<![CDATA[", "]]>")
# What Python's JSON reads, and more.
_LIKE_JSON = (
    r"""[ \t\n\r]*["\[{](?s:.*)""",
    r"[ \t\n\r]*(null|true|false|NaN|-?Infinity|-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?)[ \t\n\r]*",
)


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Any = field(default_factory=dict)  # a JSON schema of an object


class CallFormat(ABC):
    """A format of calls. ``section`` is what follows the mark at its start.

    Attributes:
        start: The mark that begins a section, as mlx-lm's parser has it.
        end: The mark that ends it; empty if the end of the answer does.
        names: A regular expression of the names that the format can carry.
        several_in_section: Whether a section may hold several calls.
    """

    start: ClassVar[str]
    end: ClassVar[str]
    names: ClassVar[str] = r"[^\s\"'<>&\[\]{}|:=\\]+"
    several_in_section: ClassVar[bool] = False

    def __init__(self, marks: FormatMarks):
        self.marks = marks
        self.rules = LarkRules()

    def section(self, tools: Sequence[Tool], *, several: bool) -> str:
        """A Lark expression of a section with a call, or several ones.

        Raises:
            ValueError: If a tool cannot be called in this format.
        """
        calls = []
        for tool in tools:
            try:
                call = self._checked_call(tool)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"The tool {tool.name!r:.60} cannot be called: {error}.") from None
            except (TypeError, AttributeError, KeyError, ArithmeticError):
                problem = "its parameters are no JSON schema"
                raise ValueError(
                    f"The tool {tool.name!r:.60} cannot be called: {problem}."
                ) from None
            calls.append(self.rules.rule(call))
        any_call = self.rules.rule(one_of(calls))
        return self.calls(any_call, several=several and self.several_in_section)

    def calls(self, call: str, *, several: bool) -> str:
        """A Lark expression of a section of calls."""
        inside = f"({call})+" if several else call
        return f"{inside} {self.marks.expression(self.end)}"

    @abstractmethod
    def call(self, tool: Tool) -> str | None:
        """A Lark expression of a call; None if it cannot be written."""

    def view(self, tool: Tool) -> Any:
        """The tool's parameters as mlx-lm's parser must see them to read the types."""
        return tool.parameters

    def _checked_call(self, tool: Tool) -> str:
        if not re.fullmatch(self.names, tool.name):
            raise ValueError("this model's format has no such names")
        call = self.call(tool)
        if call is None:
            raise ValueError("its required arguments cannot be written in this model's format")
        return call

    def _values(self, tool: Tool, dialect: Dialect) -> ValueRules:
        return ValueRules(self.rules, Schemas(tool.parameters), dialect, self.marks)

    def _objects(self, tool: Tool) -> list[Plain]:
        """The alternatives of a call's arguments."""
        schema = tool.parameters
        if isinstance(schema, dict) and not (schema.keys() & {"type", "$ref", "anyOf", "oneOf"}):
            schema = {**schema, "type": "object"}
        alternatives = Schemas(tool.parameters).alternatives(schema)
        return [plain for plain in alternatives if plain.get("type") == "object"]

    def _json_object(self, tool: Tool, *forbidden: str) -> str | None:
        return self._values(tool, json_dialect(*forbidden)).any_of(self._objects(tool))

    def _padding(self) -> str:
        """A Lark expression of the spaces and lines that may be between two marks."""
        spaces = self.rules.terminal([r"( \n?|\n{1,2})"])
        return f"{spaces}?"


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
        more = f"({comma} {call})*" if several else ""
        return f"{space} {literal('[')} {call} {more} {literal(']')}"


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
        found = [body for body in bodies if body is not None]
        if not found:
            return None
        number = self.rules.terminal(["[0-9]{1,3}"])
        opening = self.marks.expression(f'<|open|>call tool="{tool.name}" index="')
        closing = self.marks.expression("<|close|>call<|sep|>")
        middle = self.marks.expression('"<|sep|>')
        return f"{opening} {number} {middle} {one_of(found)} {closing}"

    def _arguments(self, plain: Plain, values: ValueRules) -> str | None:
        arguments: list[str] = []
        required = plain.get("required", ())
        for name, schema in listed_properties(plain).items():
            written = self._argument(name, schema, values)
            if written is not None:
                arguments.append(written if name in required else f"({written})?")
            elif name in required:
                return None
        return " ".join(arguments)

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
        bodies = [values.members(plain, brackets, key=self._key) for plain in self._objects(tool)]
        found = [body for body in bodies if body is not None]
        return f"{literal(f'call:{tool.name}')} {one_of(found)}" if found else None

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
            raise ValueError("its name is a word of Python, whose form this model's calls have")
        values = self._values(tool, python_dialect(self.end))
        comma = self.rules.terminal([",[ ]?"])
        brackets = Brackets(literal("("), comma, literal("="), literal(")"))
        bodies = [values.members(plain, brackets, key=self._key) for plain in self._objects(tool)]
        found = [body for body in bodies if body is not None]
        return f"{literal(tool.name)} {one_of(found)}" if found else None

    @staticmethod
    def _key(name: str) -> str | None:
        is_name = re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and not keyword.iskeyword(name)
        return name if is_name else None

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a Python list of calls."""
        comma = self.rules.terminal([",[ ]?"])
        more = f"({comma} {call})*" if several else ""
        return f"{literal('[')} {call} {more} {literal(']')} {self.marks.expression(self.end)}"


class TaggedFormat(CallFormat):
    """Arguments between tags, the strings among them without quotes.

    Attributes:
        forbidden: FormatMarks that no value may hold beside its own end.
        closing: The tag at an argument's end, with what is before it.
        strips: Whether the parser takes spaces off the ends of a value.
        null_is_none: Whether the parser reads the word null as None, even if it is a string.
        needs_argument: Whether the parser fails on a call without arguments.
    """

    forbidden: ClassVar[tuple[str, ...]]
    closing: ClassVar[str]
    strips: ClassVar[bool] = True
    null_is_none: ClassVar[bool] = False
    needs_argument: ClassVar[bool] = False

    @abstractmethod
    def opening(self, name: str) -> str:
        """The tag at an argument's beginning."""

    def between(self) -> str:
        """A Lark expression of what may follow an argument."""
        return self._padding()

    def view(self, tool: Tool) -> Any:
        """Returns parameters that have only the types "string" and "object".

        For an object mlx-lm's parser reads any JSON.
        """
        schemas = Schemas(tool.parameters)
        properties: dict[str, Any] = {}
        for plain in self._objects(tool):
            for name, schema in listed_properties(plain).items():
                is_text = self._is_text(schemas.alternatives(schema))
                kind = "string" if is_text else "object"  # of which any JSON is read
                if properties.setdefault(name, {"type": kind}) != {"type": kind}:
                    properties[name] = {"type": "object"}
        return {"type": "object", "properties": properties}

    def arguments(self, tool: Tool) -> list[str]:
        """Returns Lark expressions of the arguments, one for each alternative of the parameters.

        Raises:
            ValueError: If a part of the schema is not supported.
        """
        types = self.view(tool)["properties"]
        values = self._values(tool, json_dialect(self.closing.strip(), *self.forbidden))
        written = partial(self._argument, types=types, values=values)
        found = []
        for plain in self._objects(tool):
            if plain.get("minProperties", 0) > len(plain.get("required", ())):
                raise ValueError('"minProperties" is not supported beside "properties"')
            if plain.get("maxProperties", 1000) < len(plain.get("properties", {})):
                raise ValueError('"maxProperties" is not supported beside "properties"')
            found.append(self._in_sequence(plain, written))
        return [sequence for sequence in found if sequence is not None]

    def _argument(
        self, name: str, schema: Any, *, types: dict[str, Any], values: ValueRules
    ) -> str | None:
        if not re.fullmatch(self.names, name):
            return None
        value = self._value(schema, types[name]["type"] == "string", values)
        opening = self.marks.expression(self.opening(name))
        return None if value is None else f"{opening} {value} {self.between()}"

    def _is_text(self, alternatives: list[Plain]) -> bool:
        """Whether a value is written as a plain text, as strings are."""
        kinds = {kind for plain in alternatives for kind in types_of(plain)}
        return kinds == {"string"} or (self.null_is_none and kinds == {"string", "null"})

    def _value(self, schema: Any, is_text: bool, values: ValueRules) -> str | None:
        """A Lark expression of a value and its closing tag."""
        end = self.marks.expression(self.closing)
        written: list[str] = []
        for plain in values.schemas.alternatives(schema):
            if "enum" in plain:
                for value in plain["enum"]:
                    texts = self._spellings(value, is_text, values.dialect)
                    written += [self._exactly(text) for text in texts]
                continue
            is_string = plain["type"] == "string"
            if is_string and is_text:
                written += self._text(plain, values)
                continue
            if is_string:
                written += self._bare_word(plain)
            if is_text:  # null beside a string
                written.append(self._exactly("null"))
                continue
            if (expression := values.any_of([plain])) is not None:
                written.append(f"{expression} {end}")
        return self.rules.rule(one_of(written)) if written else None

    def _exactly(self, text: str) -> str:
        """A text and its closing tag, as one terminal: beside others the longest one counts."""
        return self.marks.text_until(self.rules, self.closing, [quoted_regex(text)])

    def _text(self, plain: Plain, values: ValueRules, *, never: Sequence[str] = ()) -> list[str]:
        """A string that is written as it is."""
        inside = string_regexes(plain, BARE)
        if inside is None:
            return []
        matching = [*inside, _WITHOUT_SPACE_AROUND] if inside and self.strips else inside
        if self.null_is_none:
            never = [*never, r"\s*(?i:null)\s*" if self.strips else "(?i:null)"]
        forbidden = self.forbidden
        return [
            self.marks.text_until(self.rules, self.closing, matching, never, forbidden=forbidden)
        ]

    def _bare_word(self, plain: Plain) -> list[str]:
        """A string beside JSON's values, without quotes."""
        inside = string_regexes(plain, BARE)
        if inside is None:
            return []
        matching = [_BARE_WORD, *inside]
        return [self.marks.text_until(self.rules, self.closing, matching, [_LITERAL])]

    def _spellings(self, value: Any, is_text: bool, dialect: Dialect) -> list[str]:
        """How a value of an enumeration may be written."""
        if value is None and is_text:
            return ["null"]
        if not is_text:
            text = dialect.written(value)
            found = [] if text is None else [text]
            if isinstance(value, str) and re.fullmatch(_BARE_WORD, value):
                found += [] if re.fullmatch(_LITERAL, value) or value != value.strip() else [value]
            return found
        if self.null_is_none and value.lower() == "null":
            return []
        is_carried = dialect.allows(value) and not (self.strips and value != value.strip())
        return [value] if is_carried else []

    def _in_sequence(self, plain: Plain, written: Callable[[str, Any], str | None]) -> str | None:
        """Arguments in the order of the schema, without those that may be left out."""
        arguments: list[tuple[str, bool]] = []
        required = plain.get("required", ())
        for name, schema in listed_properties(plain).items():
            expression = written(name, schema)
            if expression is not None:
                arguments.append((expression, name in required))
            elif name in required:
                return None
        if self.needs_argument and not any(needed for _, needed in arguments):
            sequences = []
            rest = ""
            for expression, _ in reversed(arguments):
                sequences.append(f"{expression} {rest}")
                rest = self.rules.rule(f"({expression})? {rest}")
            return one_of(sequences) if sequences else None
        return " ".join(text if needed else f"({text})?" for text, needed in arguments)


class Qwen3Coder(TaggedFormat):
    """``<function=name>`` with ``<parameter=key>``, each on lines of their own."""

    start = "<tool_call>"
    end = "</tool_call>"
    names = r"[^\s<>]+"
    forbidden = ("</parameter>", "</function>", "</tool_call>")
    closing = "\n</parameter>"
    strips = False
    null_is_none = True

    def opening(self, name: str) -> str:
        """Returns the tag at an argument's beginning."""
        return f"<parameter={name}>\n"

    def between(self) -> str:
        """Returns a Lark expression of what follows an argument."""
        return literal("\n")

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        expression = self.marks.expression
        bodies = self.arguments(tool)
        if not bodies:
            return None
        opening = expression(f"<function={tool.name}>\n")
        return f"{opening} {one_of(bodies)} {expression('</function>')}"

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a section, with line breaks around its call."""
        line = f"{literal(chr(10))}?"
        return f"{line} {call} {line} {self.marks.expression(self.end)}"


class Glm47(TaggedFormat):
    """The name, and ``<arg_key>`` with ``<arg_value>``: GLM 4.5 to 4.7, Laguna."""

    start = "<tool_call>"
    end = "</tool_call>"
    names = r"[^\s<>{}\[\]\"'=]+"
    forbidden = ("</tool_call>",)
    closing = "</arg_value>"
    tag = "arg"

    def opening(self, name: str) -> str:
        """Returns the tag at an argument's beginning."""
        return f"<{self.tag}_key>{name}</{self.tag}_key>"

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        bodies = self.arguments(tool)
        return f"{literal(tool.name)} {self._padding()} {one_of(bodies)}" if bodies else None

    def _value(self, schema: Any, is_text: bool, values: ValueRules) -> str | None:
        value = super()._value(schema, is_text, values)
        opening = self.marks.expression(f"<{self.tag}_value>")
        return None if value is None else f"{self._padding()} {opening} ({value})"


class Longcat(Glm47):
    """The same with tags of its own. Without arguments a call is JSON."""

    start = "<longcat_tool_call>"
    end = "</longcat_tool_call>"
    forbidden = ("</longcat_tool_call>",)
    closing = "</longcat_arg_value>"
    tag = "longcat_arg"
    needs_argument = True

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written.

        A call without arguments is a JSON object.
        """
        written = []
        if any(not plain.get("required") for plain in self._objects(tool)):
            without = json.dumps({"name": tool.name, "arguments": {}}, ensure_ascii=False)
            written.append(literal(without))
        for arguments in self.arguments(tool):
            written.append(f"{literal(tool.name)} {self._padding()} {arguments}")
        return one_of(written) if written else None


class MinimaxM2(TaggedFormat):
    """``<invoke name="…">`` with ``<parameter name="…">``."""

    start = "<minimax:tool_call>"
    end = "</minimax:tool_call>"
    names = r"[^\s\"'<>]+"
    forbidden = ("</invoke>", "</minimax:tool_call>")
    closing = "</parameter>"
    null_is_none = True
    several_in_section = True

    def opening(self, name: str) -> str:
        """Returns the tag at an argument's beginning."""
        return f'<parameter name="{name}">'

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        bodies = self.arguments(tool)
        if not bodies:
            return None
        opening = self.marks.expression(f'<invoke name="{tool.name}">')
        closing = self.marks.expression("</invoke>")
        return f"{opening} {self._padding()} {one_of(bodies)} {closing} {self._padding()}"

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a section of calls."""
        return f"{self._padding()} {super().calls(call, several=several)}"


class MiniCpm5(TaggedFormat):
    """``<function name="…">`` with ``<param name="…">``, whose values may be CDATA."""

    start = "<function name="
    end = "</function>"
    names = r"[^\s\"'<>]+"
    forbidden = ("</function>",)
    closing = "</param>"
    null_is_none = True

    def opening(self, name: str) -> str:
        """Returns the tag at an argument's beginning."""
        return f'<param name="{name}">'

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        bodies = self.arguments(tool)
        opening = self.marks.expression(f'"{tool.name}">')
        return f"{opening} {self._padding()} {one_of(bodies)}" if bodies else None

    def _text(self, plain: Plain, values: ValueRules, *, never: Sequence[str] = ()) -> list[str]:
        inside = string_regexes(plain, BARE)
        if not inside:  # whatever is in a block of CDATA, it is a string
            null = r"\s*<!\[CDATA\[(?i:null)\]\]>\s*"
            return super()._text(plain, values, never=[*never, null])
        bare = super()._text(plain, values, never=[*never, quoted_regex(_CDATA[0]) + "(?s:.*)"])
        others = [containing(_CDATA[1]), "(?i:null)"]
        end = _CDATA[1] + self.closing
        forbidden = (self.closing, *self.forbidden)
        block = self.marks.text_until(self.rules, end, inside, others, forbidden=forbidden)
        return [*bare, f"{self.marks.expression(_CDATA[0])} {block}"]


class MuseSpark(TaggedFormat):
    """``<atem:invoke name="…">`` with ``<atem:parameter name="…">``, whose values may be JSON."""

    start = "<atem:function_calls>"
    end = "</atem:function_calls>"
    names = r"[^\s\"<>]+"
    forbidden = ("</atem:invoke>", "</atem:function_calls>")
    closing = "</atem:parameter>"
    several_in_section = True

    def opening(self, name: str) -> str:
        """Returns the tag at an argument's beginning."""
        return f'<atem:parameter name="{name}">'

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        bodies = self.arguments(tool)
        if not bodies:
            return None
        opening = self.marks.expression(f'<atem:invoke name="{tool.name}">')
        closing = self.marks.expression("</atem:invoke>")
        return f"{opening} {self._padding()} {one_of(bodies)} {closing} {self._padding()}"

    def calls(self, call: str, *, several: bool) -> str:
        """Returns a Lark expression of a section of calls."""
        return f"{self._padding()} {super().calls(call, several=several)}"

    def _text(self, plain: Plain, values: ValueRules, *, never: Sequence[str] = ()) -> list[str]:
        found = super()._text(plain, values, never=[*never, *_LIKE_JSON])
        quoted = values.any_of([plain])
        end = self.marks.expression(self.closing)
        return found if quoted is None else [*found, f"{quoted} {end}"]

    def _spellings(self, value: Any, is_text: bool, dialect: Dialect) -> list[str]:
        found = super()._spellings(value, is_text, dialect)
        if not is_text:
            return found
        text = dialect.written(value)
        is_json = any(re.fullmatch(regex, value) for regex in _LIKE_JSON)
        return [*([] if is_json else found), *([] if text is None else [text])]


FORMATS: dict[str, type[CallFormat]] = {
    "function_gemma": FunctionGemma,
    "gemma4": Gemma4,
    "glm47": Glm47,
    "json_tools": JsonTools,
    "kimi_k2": KimiK2,
    "kimi_k3": KimiK3,
    "laguna": Glm47,
    "longcat": Longcat,
    "minicpm5": MiniCpm5,
    "minimax_m2": MinimaxM2,
    "mistral": Mistral,
    "muse_spark": MuseSpark,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
}


def format_name_of(tokenizer: Any) -> str:
    """The name of the format of a tokenizer's calls: that of mlx-lm's parser for it.

    Raises:
        ValueError: If it has none, or one that is not known here.
    """
    parser = getattr(tokenizer, "tool_parser", None)
    name = getattr(parser, "__module__", "").rpartition(".")[2]
    if name not in FORMATS:
        raise ValueError("The format of this model's calls is not known here.")
    return name
