"""How models write calls: grammars of what mlx-lm's parsers read.

Each text of a grammar becomes calls whose arguments follow their schemas. A format is a row of
the table in tool_formats.py, and its class says where the arguments stand. What a format cannot
carry is a ValueError that says so.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .lark import LarkRules, any_of, literal_of, matching, one_of
from .schema_keywords import LIMITS
from .schemas import Document, is_text, type_of

_NULL = r"\s*(?i:null)\s*"
_PARTS = ("array", "object")
_SCALARS = ("string", "number", "boolean", "null")
# Limits of a string that are not those of what a parser makes of it without spaces at its ends.
_TRIMMED = {"enum", "minLength", "maxLength", "pattern"}
_SPACE_AROUND = r"[\s\x1c-\x1f](?s:.*)|(?s:.*)[\s\x1c-\x1f]"


@contextmanager
def calling(name: str) -> Iterator[None]:
    """A block whose ValueErrors become sentences about a tool."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The tool {name!r:.60} cannot be called: {error}.") from None


class Tool(Document):
    """A function that a model may call, with the JSON schema of its arguments.

    Attributes:
        words: How its name is written, for templates.

    Raises:
        ValueError: If the schema has a part that cannot be followed. It names the tool.
    """

    def __init__(self, name: str, parameters: Any):
        self.name = name
        self.words = {"name": name, "json_name": json.dumps(name, ensure_ascii=False)}
        with calling(name):
            super().__init__(parameters)

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments as llguidance reads it.

        Where it lists properties and does not say, none but these are written.
        """
        root = {**self.root, "type": "object"}
        if root.keys() & {"properties", "allOf", "anyOf", "oneOf", "$ref"} == {"properties"}:
            root.setdefault("additionalProperties", False)
        return self.by_itself(root)


@dataclass(frozen=True)
class CallFormat:
    """A format that has the arguments as one object of JSON.

    Its texts are templates: see :meth:`LarkRules.template`.

    Attributes:
        start: The mark that begins a section of calls, as mlx-lm's parser has it.
        end: The mark that ends it; empty if the end of the answer does.
        call: A call, with ``$name`` or ``$json_name``, and ``$arguments``.
        section: What follows the mark at the start, with ``$calls``.
        names: A regular expression of the names that a tool may have.
        several: Whether a section may hold several calls.
        comma: What stands between them.
    """

    start: str
    end: str
    call: str
    section: str = "$calls"
    names: str = r"[^\s\"'<>&\[\]{}|:=\\]+"
    several: bool = False
    comma: str = ""

    def section_of(self, tools: Sequence[Tool], rules: LarkRules, *, several: bool) -> str:
        """A Lark expression of what follows the mark at the start: a call, or several.

        Raises:
            ValueError: If a tool cannot be called in this format. It names the tool.
        """
        written = []
        for tool in tools:
            with calling(tool.name):
                if not re.fullmatch(self.names, tool.name):
                    raise ValueError("this model's format has no such names")
                written.append(rules.rule(self.call_of(tool, rules)))
        call = rules.rule(one_of(written))
        calls = call
        if several and self.several:
            calls = f"{call} ({rules.template(self.comma)} {call})*"
        return rules.template(self.section + self.end, calls=calls)

    def call_of(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of a call."""
        return rules.template(self.call, tool.words, arguments=self.arguments(tool, rules))

    def arguments(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of the arguments."""
        return rules.json(tool.schema)

    def view(self, tool: Tool) -> Any:
        """The tool's parameters as mlx-lm's parser must see them to read the types."""
        return tool.given


@dataclass(frozen=True)
class Mistral(CallFormat):
    """``name[ARGS]{…}``, or a list of JSON."""

    def section_of(self, tools: Sequence[Tool], rules: LarkRules, *, several: bool) -> str:
        """A Lark expression of calls with headers, or of a list of calls."""
        listed = super().section_of(tools, rules, several=several)
        headed = []
        for tool in tools:
            if re.fullmatch(r"[\w-]+", tool.name, re.ASCII):
                header = rules.expression(f"{tool.name}[ARGS]")
                headed.append(rules.rule(f"{header} {self.arguments(tool, rules)}"))
        if not headed:
            return listed
        call = rules.rule(one_of(headed))
        calls = call
        if several:
            calls = f"{call} ({rules.expression(self.start)}? {call})*"
        return one_of([listed, calls])


@dataclass(frozen=True)
class ListedFormat(CallFormat):
    """A format that has the arguments one by one, in the order of the schema.

    Each is JSON, but strings may stand as they are, as between tags.

    Attributes:
        opening: What stands before a value, with ``$key``, and ``$type`` for its type.
        closing: What stands after it.
        between: What stands between two arguments.
        keys: A regular expression of the names that an argument may have.
        empty: A call without arguments, if it is written in another way.
        free_keys: A regular expression of names that a schema does not list; empty: only those that
            it lists are written.
        never: Texts that no string holds beside its end, since the parser takes them for its marks.
        plain: Whether strings stand as they are.
        trims: Whether the parser takes spaces off the ends of a value.
        null_is_none: Whether it reads the word null as None, even if it is a string.
    """

    opening: str = "$key="
    closing: str = ""
    between: str = ""
    keys: str = r"[^\s\"'<>&\[\]{}|:=\\]+"
    empty: str = ""
    free_keys: str = ""
    never: tuple[str, ...] = ()
    plain: bool = False
    trims: bool = True
    null_is_none: bool = False

    def call_of(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of a call."""
        members, _ = tool.members(tool.root)
        if not self.empty or any(required for _, _, required in members):
            return super().call_of(tool, rules)
        empty = rules.template(self.empty, tool.words)
        if not members:
            return empty
        return one_of([empty, super().call_of(tool, rules)])

    def arguments(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of the arguments."""
        return self.members(tool.root, tool, rules)

    def members(self, schema: Any, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of what the objects of a schema have.

        Raises:
            ValueError: If a member that is required cannot be written.
        """
        listed, others = tool.members(schema)
        written = []
        for key, part, required in listed:
            text = self.key(key)
            value = ""
            if text:
                value = self.value(part, tool, rules)
            if value:
                words = {"key": text, "type": self.type_read(part, tool)}
                opening = rules.template(self.opening, words)
                written.append((rules.rule(f"{opening} {value}"), required))
            elif required:
                raise ValueError(f"this model's format has no such argument as {key!r:.40}")
        between = rules.template(self.between)
        if self.free_keys and others not in (None, False):
            pattern = f"/{self.free_keys}/"
            if listed:
                names = any_of(key for key, _, _ in listed)
                pattern = f"{pattern} & ~/{names}/"
            free_key = rules.rule(pattern, "T")
            opening = rules.template(self.opening, key=free_key)
            more = f"{opening} {self.value(others, tool, rules)}"
            written.append((f"{more} ({between} {more})*", False))
        return rules.in_order(written, between, needs_one=bool(self.empty))

    def key(self, name: str) -> str:
        """A name as it is written; empty if it cannot be."""
        if re.fullmatch(self.keys, name):
            return name
        return ""

    def type_read(self, schema: Any, tool: Tool) -> str:
        """The type that the parser reads: "string" is as it is, and any other one JSON."""
        if not self.plain:
            return "object"
        parts = tool.alternatives(schema) or []
        others = [part for part in parts if not is_text(part)]
        if len(others) == len(parts):
            return "object"
        if others and not self.null_is_none:
            return "object"
        if all(type_of(part) == "null" for part in others):
            return "string"
        return "object"

    def value(self, schema: Any, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of a schema's values and what closes them; empty if there are none."""
        if self.type_read(schema, tool) != "string":
            return f"{rules.json(tool.by_itself(schema))} {rules.template(self.closing)}"
        found = []
        for part in tool.alternatives(schema) or ():
            if not is_text(part):
                found.append(rules.text_until(self.closing, "/null/"))
                continue
            unlike = []
            if self.null_is_none:
                unlike.append(_NULL)
            if self.trims and part.keys() & _TRIMMED:
                unlike.append(_SPACE_AROUND)
            found += plain_text(part, self.closing, rules, never=self.never, unlike=unlike)
        return one_of(found)

    def view(self, tool: Tool) -> Any:
        """The tool's parameters as mlx-lm's parser must see them to read the types."""
        if not self.plain:
            return tool.given
        listed, _ = tool.members(tool.root)
        types = {key: {"type": self.type_read(part, tool)} for key, part, _ in listed}
        return {"type": "object", "properties": types}


@dataclass(frozen=True)
class Gemma(ListedFormat):
    """Gemma's calls, ``call:name{key:value}``: strings between marks, and keys without quotes.

    Attributes:
        quote: The mark before and after a string.
        has_parts: Whether values may be lists and objects.
    """

    call: str = "call:$name{$arguments}"
    opening: str = "$key:"
    between: str = ","
    keys: str = r"[A-Za-z_]\w*"
    quote: str = ""
    has_parts: bool = True

    def key(self, name: str) -> str:
        """A key as it is written; empty if it cannot be."""
        if re.fullmatch(self.keys, name, re.ASCII):
            return name
        if not self.has_parts or re.search(r"[{}<,:]", name):
            return ""
        return literal_of(name)

    def value(self, schema: Any, tool: Tool, rules: LarkRules) -> str:
        """The name of the rule of a schema's values, which may refer to itself; empty for none."""
        written = repr(schema)
        tool.count_characters(len(written))
        key = tool.name, written
        return rules.recursive(key, lambda: one_of(self._values(schema, tool, rules)))

    def _values(self, schema: Any, tool: Tool, rules: LarkRules) -> list[str]:
        """Lark expressions of the values of a schema."""
        parts = tool.alternatives(schema)
        if parts is None:
            raise ValueError("limits beside alternatives cannot be written in this model's format")
        found: list[str] = []
        for part in parts:
            found += self._values_of(part, type_of(part), tool, rules)
        return found

    def _values_of(
        self, part: dict[str, Any], part_type: str, tool: Tool, rules: LarkRules
    ) -> list[str]:
        """Lark expressions of the values of an alternative; none if they cannot be written."""
        if part_type == "any":
            types = list(_SCALARS)
            if self.has_parts:
                types += _PARTS
            return [self.value({"type": types}, tool, rules)]
        if is_text(part):
            texts = plain_text(part, self.quote, rules, never=self.never)
            return [f"{rules.expression(self.quote)} {text}" for text in texts]
        if part_type in _PARTS:
            return self._lists_and_objects(part, part_type, tool, rules)
        if "enum" not in part:
            return [rules.json({"type": part_type, **part})]
        if any(isinstance(value, list | dict) for value in part["enum"]):
            return []
        return [rules.json(part)]

    def _lists_and_objects(
        self, part: dict[str, Any], part_type: str, tool: Tool, rules: LarkRules
    ) -> list[str]:
        """Lark expressions of lists, or of objects; none if the format has none."""
        if not self.has_parts:
            return []
        if part_type == "array":
            return [self._array(part, tool, rules)]
        return [f'"{{" {self.members(part, tool, rules)} "}}"']

    def _array(self, schema: dict[str, Any], tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of lists."""
        others = schema.keys() & LIMITS - {"type", "items", "minItems", "maxItems"}
        if others or isinstance(schema.get("items"), list):
            raise ValueError("a list of listed items cannot be written in this model's format")
        item = self.value(schema.get("items", {}), tool, rules)
        fewest = schema.get("minItems", 0)
        most = schema.get("maxItems")
        if most == 0 or not item:
            return literal_of("[]")
        # A first one, and so many after it.
        times = f"{max(0, fewest - 1)},"
        if most is not None:
            times += str(most - 1)
        items = f'{item} ("," {item}){{{times}}}'
        if not fewest:
            items = f"({items})?"
        return f'"[" {items} "]"'


def plain_text(
    schema: dict[str, Any],
    mark: str,
    rules: LarkRules,
    *,
    never: Sequence[str],
    unlike: Sequence[str] = (),
) -> list[str]:
    """Lark expressions of strings as they are, and the mark after them; none if there are none.

    Args:
        schema: An alternative of a schema, of strings. Its "format" is a note here.
        mark: What ends the text: it does not occur in it.
        rules: Where the terminals go.
        never: Further texts that do not occur in it.
        unlike: Regular expressions that the text does not match.
    """
    if "enum" in schema:
        left = []
        for text in schema["enum"]:
            has_mark = any(each in text for each in (mark, *never))
            if not has_mark and not any(re.fullmatch(each, text) for each in unlike):
                left.append(text)
        if not left:
            return []
        return [rules.text_until(mark, f"/{any_of(left)}/")]
    shortest = schema.get("minLength", 0)
    longest = schema.get("maxLength", "")
    forms = [rf"/[^\x00]{{{shortest},{longest}}}/"]
    forms += [f"~/{each}/" for each in unlike]
    if "pattern" in schema:
        forms.append(matching(schema["pattern"]))
    return [rules.text_until(mark, *forms, never=never)]
