"""JSON schemas of clients: as llguidance reads them, and as far as they are taken apart here.

References point into ``{"$defs": {"root": …}}``, which holds the client's schema. So any part of it
is a schema by itself, with this definition beside it.
"""

import json
import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

from .endings import ROOT, Endings
from .schema_keywords import COMBINED, KEYWORDS, LIMITS, LIMITS_OF, check_keyword

# Lists and objects of one schema, and its references and alternatives.
MAX_PARTS = 50_000
# Characters of a schema once what it refers to stands in its place, and of its parts where a
# format of calls writes them one by one.
MAX_CHARACTERS = 1_000_000
# llguidance has a state for each remainder of a division. Zeros at a divisor's end cost nothing.
MAX_DIVISOR = 10_000
# Beyond this llguidance's numbers are apart by more than one.
MAX_BOUND = 2**53 - 1
# llguidance writes fractions of so many digits as they are.
N_DIGITS = 15
# References within references whose schemas are put in their places.
MAX_NESTED = 50
# Formats of strings that llguidance follows. Others are notes, as JSON Schema has it.
STRING_FORMATS = (
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)
_TYPES = {
    str: "string", bool: "boolean", int: "integer", float: "number",
    type(None): "null", list: "array", dict: "object",
}  # fmt: skip
# Between the tokens of JSON: nothing, a space, or a new line with an indentation. The limit keeps
# small models from endless spaces.
_OPTIONS = {"whitespace_pattern": r"( |\n[ ]{0,24})?"}
_VALUES = ("enum", "const", "required")
# Exclusive bounds, the others, and the sign of what lies inside.
_SIDES = (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1))
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# From here on fractions have too few digits to tell numbers apart.
_LARGE = 10 ** (N_DIGITS - 1)
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
# What moves references, or is llguidance's own, or a note.
_LEFT_OUT = (
    *("$id", "id", "$schema", "x-guidance", "title", "description", "default", "examples"),
    "$comment",
)


class Document:
    """A client's schema, to whose parts references point.

    Args:
        schema: The schema, of which nothing is known yet.

    Attributes:
        given: The schema as it came.
        root: The schema with its references moved, and without what llguidance need not know.
        n_characters: Those that the root has as JSON, and its parts where they are written again.

    Raises:
        ValueError: If it has a part that cannot be followed.
    """

    def __init__(self, schema: Any):
        if not isinstance(schema, dict):
            raise ValueError(f"{schema!r:.40} is no JSON schema")
        self.given = schema
        self._n_parts = 0
        self.n_characters = 0
        # Lengths of values as JSON, by their ids.
        self._lengths: dict[int, int] = {}
        # The least common multiple of all divisors.
        self._divisor = 1
        # References whose schemas are being put in their places.
        self._within: list[str] = []
        self.root: dict[str, Any] = self._prepared(schema)
        self._n_parts = 0
        Endings(self.root, self._at, self._count).check()

    def by_itself(self, schema: Any) -> dict[str, Any]:
        """A part of the root as llguidance reads it."""
        if isinstance(schema, dict):
            made = dict(schema)
        else:
            made = {"allOf": [schema]}
        if '"$ref"' in json.dumps(made):
            made["$defs"] = {"root": self.root}
        made["x-guidance"] = _OPTIONS
        return made

    def alternatives(self, schema: Any) -> list[dict[str, Any]] | None:
        """The schemas that a value may follow, any of them, each of one type or of some values.

        Returns:
            None if limits and alternatives are mixed, which is not taken apart.

        Raises:
            ValueError: If there are too many.
        """
        left = [schema]
        found = []
        while left:
            self._count()
            part = _as_object(left.pop())
            limits = part.keys() & LIMITS
            if isinstance(part.get("type"), list):
                left += [{**part, "type": each} for each in reversed(part["type"])]
            elif limits == {"$ref"}:
                left.append(_pointed(self.root, part["$ref"].removeprefix(ROOT)))
            elif limits in ({"anyOf"}, {"oneOf"}):
                left += reversed(part[limits.pop()])
            elif limits == {"allOf"} and len(part["allOf"]) == 1:
                left += part["allOf"]
            elif limits & COMBINED:
                return None
            elif limits & {"enum", "const"}:
                found += _enumerations(part)
            else:
                found.append(part)
        return found

    def members(self, schema: Any) -> tuple[list[tuple[str, Any, bool]], Any]:
        """What the objects of a schema have.

        Returns:
            The names and schemas of the members that are listed, each with whether it must be
            there; and the schema of all others, which nothing says of an object that lists some.

        Raises:
            ValueError: If more than that is said of them.
        """
        parts = self.alternatives(schema)
        part = schema
        known = {"properties", "required", "additionalProperties"}
        if parts is not None and len(parts) == 1:
            part = parts[0]
            known.add("type")
        others = part.keys() & LIMITS - known
        if others:
            raise ValueError(f'"{min(others)}" of an object is not supported in this format')
        properties = part.get("properties", {})
        required = part.get("required", ())
        more = part.get("additionalProperties")
        unlisted: Any = {}
        if more is not None:
            unlisted = more
        members = []
        for name in dict.fromkeys([*properties, *required]):
            members.append((name, properties.get(name, unlisted), name in required))
        if "additionalProperties" not in part and not members:
            more = {}
        return members, more

    def _count(self) -> None:
        """Counts a part that is looked at.

        Raises:
            ValueError: If there are too many.
        """
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise ValueError(
                f"it has more than {MAX_PARTS:,} parts with what they refer to: simplify it"
            )

    def count_characters(self, n: int) -> None:
        """Counts characters that stand in a grammar.

        Raises:
            ValueError: If there are too many.
        """
        self.n_characters += n
        if self.n_characters > MAX_CHARACTERS:
            raise ValueError(
                f"it has more than {MAX_CHARACTERS:,} characters with what it refers to: "
                "simplify it"
            )

    def _count_value(self, value: Any) -> None:
        """Counts the characters of a value of the given schema, which is written once more."""
        if id(value) not in self._lengths:
            self._lengths[id(value)] = len(json.dumps(value))
        self.count_characters(self._lengths[id(value)])

    def _count_divisor(self, value: Any) -> None:
        """Adds to what numbers must be multiples of.

        Raises:
            ValueError: If llguidance would take seconds for it.
        """
        if not _is_number(value):
            return
        if value <= 0:
            raise ValueError(f'"multipleOf" is {value}: it must be more than 0')
        digits = Decimal(repr(value)).normalize().as_tuple().digits
        self._divisor = math.lcm(self._divisor, int("".join(map(str, digits))))
        if self._divisor > MAX_DIVISOR:
            raise ValueError(
                f'"multipleOf" {value} makes the least common multiple of all of them larger than '
                f"{MAX_DIVISOR:,}, zeros at its end not counted: take smaller ones"
            )

    def _prepared(self, schema: Any, *, in_note: bool = False) -> Any:
        """A schema, or a list of some, as llguidance reads it.

        Args:
            schema: What the client sent.
            in_note: Whether it stands below a keyword that is not JSON Schema's, where names mean
                what somebody else says. References may point there.
        """
        if not isinstance(schema, list | dict):
            self._count_value(schema)
            return schema
        self._count()
        if isinstance(schema, list):
            return [self._prepared(part, in_note=in_note) for part in schema]
        made = {}
        for name, value in schema.items():
            self.count_characters(len(name))
            if not in_note:
                check_keyword(name)
            _check_bound(name, value)
            if name in _VALUES:
                self._count_value(value)
                made[name] = value
            elif name in _SCHEMAS_BY_NAME and isinstance(value, dict):
                made[name] = {
                    key: self._prepared(part, in_note=in_note) for key, part in value.items()
                }
            elif name == "oneOf" and isinstance(value, list):
                made[name] = [self._in_place(part) for part in value]
            elif name not in _LEFT_OUT:
                made[name] = self._prepared(value, in_note=in_note or name not in KEYWORDS)
        self._count_divisor(made.get("multipleOf"))
        _mend(made)
        return made

    def _in_place(self, schema: Any) -> Any:
        """A schema without a reference: llguidance compares alternatives that it sees."""
        if not isinstance(schema, dict) or schema.keys() & LIMITS != {"$ref"}:
            return self._prepared(schema)
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#"):
            return self._prepared(schema)
        if reference in self._within:
            return self._prepared(schema)
        if len(self._within) == MAX_NESTED:
            raise ValueError("it is nested too deeply: simplify it")
        self._within.append(reference)
        found = self._in_place(_pointed(self.given, reference[1:]))
        self._within.pop()
        return found

    def _at(self, reference: str) -> Any:
        return _pointed(self.root, reference.removeprefix(ROOT))


def _as_object(schema: Any) -> dict[str, Any]:
    """A schema that may be true, for any value, or false, for none."""
    if isinstance(schema, dict):
        return schema
    if schema:
        return {}
    return {"enum": []}


def _check_bound(name: str, value: Any) -> None:
    """Raises a ValueError if a keyword is a bound whose number cannot be kept to."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _BOUNDS and is_number and abs(value) > MAX_BOUND:
        raise ValueError(
            f'"{name}" is {value}: it must be within ±{MAX_BOUND:,}; leave it out if any number '
            "will do"
        )


def _mend(made: dict[str, Any]) -> None:
    """Changes what llguidance refuses, or follows in part."""
    reference = made.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = ROOT + reference[1:]
    names = made.get("propertyNames")
    notes = {
        "format": isinstance(made.get("format"), str) and made["format"] not in STRING_FORMATS,
        "uniqueItems": made.get("uniqueItems") is False,
        "propertyNames": isinstance(names, dict) and names.keys() & LIMITS <= {"type"},
    }
    for name, says_nothing in notes.items():
        if says_nothing:
            del made[name]
    for exclusive, bound, sign in _SIDES:
        _mend_exclusive(made, exclusive, bound, sign)
        if _is_number(made.get(bound)):
            made[bound] = _rounded(made[bound], sign)
    fewest = made.get("minProperties")
    required = made.get("required")
    n_required = 0
    if isinstance(required, list):
        n_required = len(required)
    # llguidance lets a name come twice.
    if isinstance(fewest, int) and fewest > n_required + 1:
        raise ValueError('"minProperties" of several that are not required is not supported')


def _mend_exclusive(made: dict[str, Any], name: str, bound: str, sign: int) -> None:
    """Puts a bound in the place of an exclusive one, since llguidance lets some of these be met.

    Args:
        made: The schema.
        name: The exclusive bound. In older drafts it is true beside the other one.
        bound: The other one.
        sign: 1 for a minimum, -1 for a maximum.
    """
    limit = made.get(name)
    if limit is True:
        limit = made.get(bound)
    known = made.get(bound, limit)
    if _is_number(limit) and _is_number(known):
        step: float = max(1e-9, abs(limit) * 2**-52)
        is_whole = limit == int(limit)
        if is_whole and (made.get("type") == "integer" or abs(limit) >= _LARGE):
            limit = int(limit)
            step = 1
        made[bound] = sign * max(sign * (limit + sign * step), sign * known)
        del made[name]


def _rounded(limit: float, sign: int) -> float:
    """A bound in digits that llguidance writes as they are, a little further inside if need be.

    Args:
        limit: The bound.
        sign: 1 for a minimum, -1 for a maximum.
    """
    if limit == int(limit):
        return int(limit)
    rounding = ROUND_FLOOR
    if sign == 1:
        rounding = ROUND_CEILING
    rounded = Context(N_DIGITS, rounding).plus(Decimal(repr(limit)))
    if rounded == int(rounded):
        return int(rounded)
    return float(rounded)


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number within the bounds of a schema."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MAX_BOUND


def type_of(schema: dict[str, Any]) -> str:
    """The type of an alternative: its own, "enum", that of its limits, or "any" without limits."""
    if schema.get("enum") == [None]:
        return "null"
    if "enum" in schema:
        return "enum"
    if schema.get("type"):
        return schema["type"]
    for implied, names in LIMITS_OF.items():
        if schema.keys() & {*names}:
            return implied
    return "any"


def is_text(schema: dict[str, Any]) -> bool:
    """Whether all values of an alternative are strings."""
    return type_of(schema) == "string" or isinstance(schema.get("enum", [None])[0], str)


def _enumerations(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The values of a schema that follow the rest of it: its strings, and the others.

    Raises:
        ValueError: If the rest limits more than types.
    """
    limits = schema.keys() & LIMITS - {"enum", "const", "type"}
    if limits:
        raise ValueError(f'"enum" with "{min(limits)}" is not supported in this format')
    values = schema.get("enum", [schema.get("const")])
    values = [value for value in values if schema.get("const", value) == value]
    own_type = schema.get("type")
    if own_type is not None:
        types = {own_type}
        if own_type == "number":
            types.add("integer")
        values = [value for value in values if _TYPES[type(value)] in types]
    texts = [value for value in values if isinstance(value, str)]
    others = [value for value in values if not isinstance(value, str)]
    return [{"enum": group} for group in (texts, others) if group]


def _pointed(document: Any, pointer: str) -> Any:
    """The part of a document that a JSON pointer names."""
    found = document
    for part in unquote(pointer).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            if isinstance(found, list):
                found = found[int(name)]
            else:
                found = found[name]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"the reference {'#' + pointer!r:.60} does not exist") from None
    return found
