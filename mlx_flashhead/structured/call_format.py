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
from functools import cached_property
from typing import Any

from .lark import LarkRules, exactly, matching, one_of
from .schemas import Document, is_text, kind_of

_NULL = r"\s*(?i:null)\s*"
_SPACE_AROUND = r"[\s\x1c-\x1f](?s:.*)|(?s:.*)[\s\x1c-\x1f]"


@contextmanager
def calling(name: str) -> Iterator[None]:
    """A block whose ValueErrors become sentences about a tool."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The tool {name!r:.60} cannot be called: {error}.") from None


@dataclass(frozen=True)
class Tool:
    """A function that a model may call, with the JSON schema of its arguments."""

    name: str
    parameters: Any

    @cached_property
    def document(self) -> Document:
        """The schema, whose parts its arguments follow."""
        return Document(self.parameters)

    @property
    def arguments(self) -> list[tuple[str, Any, bool]]:
        """The names and schemas of the arguments, each with whether it must be there."""
        return self.document.members(self.document.root)[0]

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments as llguidance reads it.

        Where it lists properties and does not say, none but these are written.
        """
        root = {**self.document.root, "type": "object"}
        if root.keys() & {"properties", "allOf", "anyOf", "oneOf", "$ref"} == {"properties"}:
            root.setdefault("additionalProperties", False)
        return self.document.by_itself(root)


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
        call = rules.rule(one_of(self.rule_of(tool, rules) for tool in tools))
        again = f"({rules.template(self.comma)} {call})*" if several and self.several else ""
        return rules.template(self.section + self.end, calls=f"{call} {again}")

    def rule_of(self, tool: Tool, rules: LarkRules) -> str:
        """The rule of a call; a ValueError names the tool."""
        with calling(tool.name):
            if not re.fullmatch(self.names, tool.name):
                raise ValueError("this model's format has no such names")
            return rules.rule(self.call_of(tool, rules))

    def call_of(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of a call."""
        words = {"name": tool.name, "json_name": json.dumps(tool.name, ensure_ascii=False)}
        return rules.template(self.call, words, arguments=self.arguments(tool, rules))

    def arguments(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of the arguments."""
        return rules.json(tool.schema)

    def view(self, tool: Tool) -> Any:
        """The tool's parameters as mlx-lm's parser must see them to read the types."""
        return tool.parameters


@dataclass(frozen=True)
class ListedFormat(CallFormat):
    """A format that has the arguments one by one, in the order of the schema, each as JSON.

    Attributes:
        opening: What stands before a value, with ``$key``, and ``$kind`` for its type.
        closing: What stands after it.
        between: What stands between two arguments.
        keys: A regular expression of the names that an argument may have.
        empty: A call without arguments, if it is written in another way.
    """

    opening: str = "$key="
    closing: str = ""
    between: str = ""
    keys: str = r"[^\s\"'<>&\[\]{}|:=\\]+"
    empty: str = ""

    def call_of(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of a call."""
        if not self.empty or any(required for _, _, required in tool.arguments):
            return super().call_of(tool, rules)
        words = {"json_name": json.dumps(tool.name, ensure_ascii=False)}
        empty = rules.template(self.empty, words)
        return one_of([empty, super().call_of(tool, rules)]) if tool.arguments else empty

    def arguments(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of the arguments.

        Raises:
            ValueError: If one that is required cannot be written.
        """
        written = []
        for key, schema, required in tool.arguments:
            value = self.value(schema, tool.document, rules) if re.fullmatch(self.keys, key) else ""
            if value:
                words = {"key": key, "kind": self.kind(schema, tool.document)}
                opening = rules.template(self.opening, words)
                written.append((rules.rule(f"{opening} {value}"), required))
            elif required:
                raise ValueError(f"this model's format has no such argument as {key!r:.40}")
        return rules.in_order(written, rules.template(self.between), needs_one=bool(self.empty))

    def kind(self, schema: Any, document: Document) -> str:
        """The type that an argument is said to have."""
        return "object"

    def value(self, schema: Any, document: Document, rules: LarkRules) -> str:
        """A Lark expression of a schema's values and what closes them; empty if there are none."""
        return f"{rules.json(document.by_itself(schema))} {rules.template(self.closing)}"


@dataclass(frozen=True)
class TaggedFormat(ListedFormat):
    """Arguments between tags: strings as they are, all else as JSON.

    Attributes:
        never: Further texts that no string holds, since the parser takes them for its marks.
        trims: Whether it takes spaces off the ends of a value.
        null_is_none: Whether it reads the word null as None, even if it is a string.
    """

    never: tuple[str, ...] = ()
    trims: bool = True
    null_is_none: bool = False

    def kind(self, schema: Any, document: Document) -> str:
        """The type that the parser reads: "string" is as it is, and any other one JSON."""
        parts = document.alternatives(schema) or []
        others = [part for part in parts if not is_text(part)]
        is_null = self.null_is_none and all(kind_of(part) == "null" for part in others)
        return "string" if len(parts) > len(others) and (not others or is_null) else "object"

    def value(self, schema: Any, document: Document, rules: LarkRules) -> str:
        """A Lark expression of a schema's values and what closes them; empty if there are none."""
        if self.kind(schema, document) != "string":
            return super().value(schema, document, rules)
        found = []
        for part in document.alternatives(schema) or ():
            if not is_text(part):
                found.append(rules.text_until(self.closing, exactly(["null"])))
                continue
            trims = self.trims and bool(part.keys() & {"enum", "minLength", "maxLength", "pattern"})
            unlike = [_NULL] * self.null_is_none + [_SPACE_AROUND] * trims
            found += plain_text(part, self.closing, rules, never=self.never, unlike=unlike)
        return one_of(found)

    def view(self, tool: Tool) -> Any:
        """The arguments with the types that the parser knows them by."""
        document = tool.document
        types = {key: {"type": self.kind(part, document)} for key, part, _ in tool.arguments}
        return {"type": "object", "properties": types}


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
        left = [text for text in schema["enum"] if not any(each in text for each in [mark, *never])]
        left = [text for text in left if not any(re.fullmatch(each, text) for each in unlike)]
        return [rules.text_until(mark, exactly(left))] if left else []
    length = f"{schema.get('minLength', 0)},{schema.get('maxLength', '')}"
    forms = [rf"/[^\x00]{{{length}}}/", *(f"~/{each}/" for each in unlike)]
    forms += [matching(schema["pattern"])] if "pattern" in schema else []
    return [rules.text_until(mark, *forms, never=never)]
