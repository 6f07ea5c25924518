"""Formats that write each argument of a call between tags of its own."""

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from .call_format import CallFormat, Tool
from .dialects import (
    BARE,
    Dialect,
    json_dialect,
)
from .lark import literal, one_of
from .regexes import containing, quoted_regex
from .schemas import Plain, Schemas, listed_properties, types_of
from .values import ValueRules, string_regexes

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


class TaggedFormat(CallFormat):
    """Arguments between tags, the strings among them without quotes.

    Attributes:
        forbidden: Marks that no value may hold beside its own end.
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
            found.append(self._sequence(plain, written))
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

    def _sequence(self, plain: Plain, written: Callable[[str, Any], str | None]) -> str | None:
        """A Lark expression of a call's arguments; None if they cannot be written."""
        arguments = self._in_sequence(plain, written)
        if arguments is None:
            return None
        if self.needs_argument and not any(needed for _, needed in arguments):
            sequences = []
            rest = ""
            for expression, _ in reversed(arguments):
                sequences.append(f"{expression} {rest}")
                rest = self.rules.rule(f"({expression})? {rest}")
            return one_of(sequences) if sequences else None
        return self._joined(arguments)


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
    prefix: ClassVar[str] = ""  # of the tags' names

    def opening(self, name: str) -> str:
        """Returns the tag at an argument's beginning."""
        return f'<{self.prefix}parameter name="{name}">'

    def call(self, tool: Tool) -> str | None:
        """Returns a Lark expression of a call; None if its arguments cannot be written."""
        bodies = self.arguments(tool)
        if not bodies:
            return None
        opening = self.marks.expression(f'<{self.prefix}invoke name="{tool.name}">')
        closing = self.marks.expression(f"</{self.prefix}invoke>")
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


class MuseSpark(MinimaxM2):
    """``<atem:invoke name="…">`` with ``<atem:parameter name="…">``, whose values may be JSON."""

    start = "<atem:function_calls>"
    end = "</atem:function_calls>"
    names = r"[^\s\"<>]+"
    forbidden = ("</atem:invoke>", "</atem:function_calls>")
    closing = "</atem:parameter>"
    null_is_none = False
    prefix = "atem:"

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
