"""Rules of a Lark grammar for the values of a JSON schema, in one of the dialects."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .dialects import Dialect, FormatMarks
from .lark import LarkRules, one_of
from .numbers import ANY_NUMBER, bounds_of, integer_regex, number_regex
from .regexes import ANY_CHARACTER, quoted_regex, written_pattern
from .schemas import MAX_DEPTH, Plain, Schemas, allows_more, listed_properties

FREE_LEVELS = 6  # of a value that may be anything: lists and objects within each other


@dataclass(frozen=True)
class Brackets:
    """Lark expressions around and between the members of an object, or of a call."""

    opening: str
    comma: str
    colon: str
    closing: str


class ValueRules:
    """Writes the rules of values.

    Args:
        rules: Where they are collected.
        schemas: The document that references point into.
        dialect: How values are written.
        marks: The marks of the format.
    """

    def __init__(self, rules: LarkRules, schemas: Schemas, dialect: Dialect, marks: FormatMarks):
        self.rules = rules
        self.schemas = schemas
        self.dialect = dialect
        self.marks = marks
        self._known: dict[tuple[str, int], str | None] = {}
        self._free: dict[int, str] = {}

    def value(self, schema: Any, depth: int = 0) -> str | None:
        """A Lark expression of the values of a schema; None if none can be written.

        Raises:
            ValueError: If a part of the schema cannot be followed.
        """
        key = json.dumps(schema), depth
        if key not in self._known:
            if schema is True or schema == {}:
                self._known[key] = self._anything(0)
            else:
                self._known[key] = self.any_of(self.schemas.alternatives(schema), depth)
        return self._known[key]

    def any_of(self, alternatives: Sequence[Plain], depth: int = 0) -> str | None:
        """A Lark expression of the values of plain schemas."""
        written = [self._plain(plain, depth) for plain in alternatives]
        found = [expression for expression in written if expression is not None]
        if not found:
            return None
        return found[0] if len(found) == 1 else self.rules.rule(one_of(found))

    def json_brackets(self) -> Brackets:
        """The brackets of an object."""
        dialect = self.dialect
        terminal = self.rules.terminal
        return Brackets(
            opening=terminal([r"\{" + dialect.after_opening]),
            comma=terminal([dialect.comma]),
            colon=terminal([dialect.colon]),
            closing=terminal([dialect.before_closing + r"\}"]),
        )

    def members(
        self,
        plain: Plain,
        brackets: Brackets,
        *,
        key: Callable[[str], str | None] | None = None,
        depth: int = 0,
    ) -> str | None:
        """A Lark expression of an object's members within brackets; None if it has no values.

        Args:
            plain: A plain schema of objects.
            brackets: What is written around and between the members.
            key: How a listed key is written; the dialect's way without it.
            depth: How many objects and lists this one is in.
        """
        key_of = self.dialect.key if key is None else key
        required = plain.get("required", [])
        listed = listed_properties(plain)
        members: list[tuple[str, bool]] = []  # with whether it is required
        for name, schema in listed.items():
            text = key_of(name)
            value = None if text is None else self.value(schema, depth + 1)
            if text is not None and value is not None:
                written_key = self.marks.expression(text)
                members.append((f"{written_key} {brackets.colon} {value}", name in required))
            elif name in required:
                return None
        more = None
        if key is None and allows_more(plain):
            more = self._further_member(plain, [*listed], brackets, depth)
        self._check_counts(plain, members, more)
        if not listed and more is not None:
            counts = plain.get("minProperties", 0), plain.get("maxProperties")
            return self._wrapped(brackets, _repeated(more, brackets.comma, *counts))
        return self._in_order(members, more, brackets)

    def _plain(self, plain: Plain, depth: int) -> str | None:
        if "enum" in plain:
            texts = [self.dialect.written(value) for value in plain["enum"]]
            known = [self.marks.expression(text) for text in texts if text]
            return one_of(known) if known else None
        kind = plain["type"]
        if kind == "null":
            return self.dialect.word(None)
        if kind == "boolean":
            return one_of([self.dialect.word(True), self.dialect.word(False)])
        if kind in ("integer", "number"):
            regex = number_regex_of(plain)
            return None if regex is None else self.rules.terminal([regex])
        if kind == "string":
            inside = string_regexes(plain, self.dialect)
            return None if inside is None else self.dialect.string(self.rules, self.marks, inside)
        if depth >= MAX_DEPTH:
            return None
        if kind == "array":
            return self._array(plain, depth)
        if not self.dialect.has_objects:
            return None
        return self.members(plain, self.json_brackets(), depth=depth)

    def _check_counts(
        self, plain: Plain, members: list[tuple[str, bool]], more: str | None
    ) -> None:
        """Raises a ValueError if the number of properties has a limit that is not followed."""
        fewest = plain.get("minProperties", 0)
        most = plain.get("maxProperties")
        if not members and more is not None:
            if fewest > 1:  # keys may come twice
                raise ValueError('"minProperties" of more than 1 is not supported')
            return
        if fewest > sum(required for _, required in members):
            raise ValueError('"minProperties" is not supported beside "properties"')
        if most is not None and (more is not None or most < len(members)):
            raise ValueError('"maxProperties" is not supported beside "properties"')

    def _further_member(
        self, plain: Plain, names: list[str], brackets: Brackets, depth: int
    ) -> str | None:
        """A member that is not listed."""
        patterns = plain.get("patternProperties", {})
        more = plain.get("additionalProperties", not patterns)
        if patterns and (len(patterns) > 1 or names or more is not False):
            problem = "beside other properties or with more than one pattern"
            raise ValueError(f'"patternProperties" {problem} is not supported')
        if patterns:
            ((pattern, schema),) = patterns.items()
            inside = [written_pattern(pattern, self.dialect.character)]
            key = self.dialect.string(self.rules, self.marks, inside)
        else:
            schema = more
            key = self._free_key(names)
        value = self.value(schema, depth + 1)
        return None if value is None else f"{key} {brackets.colon} {value}"

    def _free_key(self, listed: list[str]) -> str:
        """A key that is not one of the listed ones."""
        if self.dialect.free_key:
            return self.rules.terminal([self.dialect.free_key], map(quoted_regex, listed))
        # a character has one way to be written here, so that a listed name is known as such
        inside = [self.dialect.character(ANY_CHARACTER) + "*"]
        if self.dialect.has_escapes:
            listed = [json.dumps(name, ensure_ascii=False)[1:-1] for name in listed]
        never = [quoted_regex(name) for name in listed]
        return self.dialect.string(self.rules, self.marks, inside, never)

    def _in_order(
        self, members: list[tuple[str, bool]], more: str | None, brackets: Brackets
    ) -> str:
        """Members in the order of the schema, without those that may be left out."""
        following = "" if more is None else f"({brackets.comma} {more})*"
        firsts: list[str] = []  # what may come first, from the last to the first
        if more is not None:
            firsts.append(f"{more} {following}")
        is_optional = True
        for member, required in reversed(members):
            rest = self.rules.rule(following) if following.strip() else ""
            if required:
                firsts = []
                is_optional = False
            firsts.append(f"{member} {rest}")
            after_comma = f"{brackets.comma} {member}"
            following = f"{after_comma} {rest}" if required else f"({after_comma})? {rest}"
        if not firsts:
            return self._wrapped(brackets, "")
        inside = one_of(reversed(firsts))
        return self._wrapped(brackets, f"({inside})?" if is_optional else inside)

    def _wrapped(self, brackets: Brackets, inside: str) -> str:
        return self.rules.rule(f"{brackets.opening} {inside} {brackets.closing}")

    def _array(self, plain: Plain, depth: int) -> str | None:
        dialect = self.dialect
        terminal = self.rules.terminal
        brackets = Brackets(
            opening=terminal([r"\[" + dialect.after_opening]),
            comma=terminal([dialect.comma]),
            colon="",
            closing=terminal([dialect.before_closing + r"\]"]),
        )
        elements = self if dialect.in_lists is None else self._within_lists()
        fewest = plain.get("minItems", 0)
        most = plain.get("maxItems")
        if not dialect.has_lists:
            most = 1 if most is None else min(most, 1)
        if plain.get("uniqueItems") and (most is None or most > 1):
            return elements._unique(plain, brackets, depth)
        firsts = [elements.value(schema, depth + 1) for schema in plain.get("prefixItems", ())]
        default = not firsts  # after listed ones nothing else is written
        other = elements.value(plain.get("items", default), depth + 1)
        inside = _list_of(firsts, other, brackets.comma, fewest, most)
        return None if inside is None else self._wrapped(brackets, inside)

    def _within_lists(self) -> "ValueRules":
        assert self.dialect.in_lists is not None
        return ValueRules(self.rules, self.schemas, self.dialect.in_lists, self.marks)

    def _unique(self, plain: Plain, brackets: Brackets, depth: int) -> str | None:
        """Some of the values of an enumeration, in its order."""
        alternatives = self.schemas.alternatives(plain.get("items", True))
        fewest = plain.get("minItems", 0)
        if any("enum" not in each for each in alternatives) or "prefixItems" in plain:
            raise ValueError('"uniqueItems" is supported for items of an "enum" alone')
        values = [value for each in alternatives for value in each["enum"]]
        texts = [self.dialect.written(value) for value in values]
        members = [(self.marks.expression(text), False) for text in dict.fromkeys(texts) if text]
        if fewest > 1 or plain.get("maxItems", len(members)) < len(members):
            raise ValueError('"uniqueItems" with "minItems" or "maxItems" is not supported')
        if fewest and not members:
            return None
        if fewest:
            following = ""
            firsts = []
            for member, _ in reversed(members):
                rest = self.rules.rule(following) if following else ""
                firsts.append(f"{member} {rest}")
                following = f"({brackets.comma} {member})? {rest}"
            return self._wrapped(brackets, one_of(firsts))
        return self._in_order(members, None, brackets)

    def _anything(self, level: int) -> str:
        """Any value, with lists and objects down to a level."""
        if level not in self._free:
            self._free[level] = self._any_value(level)
        return self._free[level]

    def _any_value(self, level: int) -> str:
        dialect = self.dialect
        found = [dialect.word(word) for word in (None, True, False)]
        found.append(self.rules.terminal([ANY_NUMBER]))
        found.append(dialect.string(self.rules, self.marks, []))
        if level < FREE_LEVELS and dialect.has_lists:
            inner = self._anything(level + 1)
            brackets = self.json_brackets()
            opening = self.rules.terminal([r"\[" + dialect.after_opening])
            closing = self.rules.terminal([dialect.before_closing + r"\]"])
            elements = _repeated(inner, brackets.comma, 0, None)
            found.append(f"{opening} {elements} {closing}")
            member = f"{self._free_key([])} {brackets.colon} {inner}"
            found.append(self._wrapped(brackets, _repeated(member, brackets.comma, 0, None)))
        return self.rules.rule(one_of(found))


def string_regexes(plain: Plain, dialect: Dialect) -> list[str] | None:
    """Finds what the inside of a plain schema's strings must match, as the dialect writes it.

    Returns:
        Regular expressions, none if the string may be anything; None if there are no such strings.
    """
    regexes = [written_pattern(pattern, dialect.character) for pattern in plain.get("patterns", ())]
    shortest = plain.get("minLength", 0)
    longest = plain.get("maxLength")
    if longest is not None and longest < shortest:
        return None
    if shortest or longest is not None:
        most = "" if longest is None else longest
        regexes.append(f"{dialect.character(ANY_CHARACTER)}{{{shortest},{most}}}")
    return regexes


def number_regex_of(plain: Plain) -> str | None:
    """A regular expression of a plain schema's numbers; None if there are none."""
    lower, upper = bounds_of(plain)
    factor = plain.get("multipleOf", 1 if plain["type"] == "integer" else None)
    if factor is None:
        return number_regex(lower, upper)
    return integer_regex(lower, upper, factor)


def _list_of(
    firsts: Sequence[str | None], other: str | None, comma: str, fewest: int, most: int | None
) -> str | None:
    """Elements of which the first ones have values of their own."""
    if most is not None and most < fewest:
        return None
    possible = list(firsts if most is None else firsts[:most])
    if None in possible:
        possible = possible[: possible.index(None)]
    is_whole = len(possible) == len(firsts)
    if other is None or not is_whole:
        if fewest > len(possible):
            return None
        rest = ""
    else:
        left = None if most is None else most - len(possible)
        if not possible:
            return _repeated(other, comma, fewest, left)
        needed = max(0, fewest - len(possible))
        limit = "" if left is None else left
        rest = f"({comma} {other}){{{needed},{limit}}}" if left != 0 else ""
    for i in reversed(range(len(possible))):
        here = f"{possible[i]} {rest}" if i == 0 else f"{comma} {possible[i]} {rest}"
        rest = here if i < fewest else f"({here})?"
    return rest


def _repeated(element: str, comma: str, fewest: int, most: int | None) -> str:
    if most == 0:
        return ""
    further = "" if most is None else most - 1
    inside = f"{element} ({comma} {element}){{{max(0, fewest - 1)},{further}}}"
    if most == 1:
        inside = element
    return inside if fewest else f"({inside})?"
