"""Gemma's calls, ``call:name{key:value}``, whose values are in dialects of their own."""

import re
from dataclasses import dataclass
from typing import Any

from .call_format import CallFormat, Tool, plain_text
from .lark import LarkRules, exactly, literal_of, one_of
from .schemas import LIMITS, Document, is_text, kind_of

_SCALARS = ("string", "number", "boolean", "null")


@dataclass(frozen=True)
class Gemma(CallFormat):
    """Strings between marks of their own, and keys without quotes.

    Attributes:
        quote: The mark before and after a string.
        keys: A regular expression of the keys without quotes.
        has_parts: Whether values may be lists and objects.
        never: Texts that no string holds, since the parser takes them for its marks.
    """

    quote: str = ""
    keys: str = r"[A-Za-z_]\w*"
    has_parts: bool = True
    never: tuple[str, ...] = ()

    def key(self, name: str) -> str:
        """A key as it is written; empty if it cannot be."""
        if re.fullmatch(self.keys, name, re.ASCII):
            return name
        return literal_of(name) if self.has_parts and not re.search(r"[{}<,:]", name) else ""

    def arguments(self, tool: Tool, rules: LarkRules) -> str:
        """A Lark expression of the arguments."""
        return _Values(self, tool.document, rules).object_of(tool.document.root)


class _Values:
    """The rules of the values of one tool."""

    def __init__(self, form: Gemma, document: Document, rules: LarkRules):
        self._form = form
        self._document = document
        self._rules = rules
        self._names: dict[str, str] = {}  # of rules, by their schemas

    def object_of(self, schema: dict[str, Any]) -> str:
        """A Lark expression of objects; a ValueError if what is required cannot be written."""
        members, more = self._document.members(schema)
        written = []
        for key, part, required in members:
            text = self._form.key(key)
            value = self._value(part) if text else ""
            if value:
                written.append((f"{self._rules.expression(f'{text}:')} {value}", required))
            elif required:
                raise ValueError(f"this model's format has no such argument as {key!r:.40}")
        further = None
        if self._form.has_parts and more not in (None, False):
            unlike = [f"~{exactly(key for key, _, _ in members)}"] if members else []
            free = self._rules.terminal("/[A-Za-z_][A-Za-z0-9_]*/", *unlike)
            further = f'{free} ":" {self._value(more)}'
        return f'"{{" {self._rules.in_order(written, literal_of(","), more=further)} "}}"'

    def _value(self, schema: Any) -> str:
        """The name of the rule of a schema's values, which may refer to itself; empty for none."""
        key = repr(schema)
        if key not in self._names:
            name = self._names[key] = self._rules.define(self._rules.new_name(), literal_of(""))
            values = one_of(self._values(schema))
            self._names[key] = self._rules.define(name, values) if values else ""
        return self._names[key]

    def _values(self, schema: Any) -> list[str]:
        parts = self._document.alternatives(schema)
        if parts is None:
            raise ValueError("limits beside alternatives cannot be written in this model's format")
        found = []
        for part in parts:
            kind = kind_of(part)
            if kind == "any":
                kinds = [*_SCALARS, *["array", "object"] * self._form.has_parts]
                found.append(self._value({"anyOf": [{"type": each} for each in kinds]}))
            elif is_text(part):
                never = self._form.never
                texts = plain_text(part, self._form.quote, self._rules, never=never)
                found += [f"{self._rules.expression(self._form.quote)} {text}" for text in texts]
            elif kind in ("array", "object"):
                write = self._array if kind == "array" else self.object_of
                found += [write(part)] if self._form.has_parts else []
            elif not any(isinstance(value, list | dict) for value in part.get("enum", ())):
                found.append(self._rules.json(part if "enum" in part else {"type": kind, **part}))
        return found

    def _array(self, schema: dict[str, Any]) -> str:
        """A Lark expression of lists."""
        others = schema.keys() & LIMITS - {"type", "items", "minItems", "maxItems"}
        if others or isinstance(schema.get("items"), list):
            raise ValueError("a list of listed items cannot be written in this model's format")
        item = self._value(schema.get("items", {}))
        fewest = schema.get("minItems", 0)
        most = schema.get("maxItems")
        if most == 0 or not item:
            return literal_of("[]")
        further = "" if most is None else most - 1
        items = f'{item} ("," {item}){{{max(0, fewest - 1)},{further}}}'
        return f'"[" {items if fewest else f"({items})?"} "]"'
