"""JSON schemas as alternatives that a grammar can be written of.

A schema is taken apart into plain ones: each of one type, without references, unions and
intersections. What JSON Schema means as a note (titles, defaults, formats that are not known) is
left out. What a grammar cannot follow is a ValueError: nothing that limits a value is ignored.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
# References and nestings that are followed; deeper values are left out where they may be.
MAX_DEPTH = 12
# Plain alternatives of one schema.
MAX_ALTERNATIVES = 200

# Of each keyword the type that it limits.
_OF_TYPE = {
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("patternProperties", "minProperties", "maxProperties"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("minLength", "maxLength", "patterns"), "string"),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), "number"),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), "number"),
}
# Keywords that limit values and are not followed. All other names are notes.
_UNSUPPORTED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "additionalItems"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems"),
    *("unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}
_LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")

Plain = dict[str, Any]  # a schema of one "type", or of some values: "enum"


@dataclass
class Schemas:
    """The schemas of one document, to whose parts references point."""

    root: Any

    def alternatives(self, schema: Any, _through: tuple[str, ...] = ()) -> list[Plain]:
        """The plain schemas that a value may follow, any of them; none if there is no such value.

        Raises:
            ValueError: If a part is wrong, or cannot be followed.
        """
        if schema is False:
            return []
        if schema is True:
            schema = {}
        _check(schema)
        found = [_base(schema)]
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in _through:
                raise ValueError(f"the reference {reference!r:.40} points to itself")
            through = (*_through, reference)
            found = _merged(found, self.alternatives(self.resolve(reference), through))
        for part in schema.get("allOf", ()):
            found = _merged(found, self.alternatives(part, _through))
        if "anyOf" in schema:
            options = [self.alternatives(part, _through) for part in schema["anyOf"]]
            found = _merged(found, _joined(options))
        if "oneOf" in schema:
            options = [self.alternatives(part, _through) for part in schema["oneOf"]]
            self._check_apart(options)
            found = _merged(found, _joined(options))
        return [typed for plain in found for typed in _of_one_type(plain)]

    def resolve(self, reference: Any) -> Any:
        """Returns the schema that a reference points to.

        Raises:
            ValueError: If the reference leads nowhere, or out of the schema.
        """
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise ValueError(f"the reference {reference!r:.60} is not within the schema")
        found = self.root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(f"the reference {reference!r:.60} does not exist") from None
        return found

    def _check_apart(self, options: list[list[Plain]]) -> None:
        for one, other in combinations(options, 2):
            for a, b in product(one, other):
                if not (self._is_apart(a, b) and self._is_apart(b, a)):
                    problem = "a value may follow several of its schemas"
                    raise ValueError(f'"oneOf" is not supported where {problem}: use "anyOf"')

    def _is_apart(self, written: Plain, other: Plain) -> bool:
        """Whether no value that is written by the first schema follows the second one."""
        if "enum" in written:
            return not any(fits(value, other) for value in written["enum"])
        if "enum" in other:
            return not any(fits(value, written) for value in other["enum"])
        if written["type"] != other["type"]:
            return {written["type"], other["type"]} != {"integer", "number"}
        if written["type"] != "object":
            return False
        own = written.get("properties", {})
        if not allows_more(written) and set(other.get("required", ())) - {*own}:
            return True
        for name in set(written.get("required", ())) & {*own} & {*other.get("properties", {})}:
            a = self.alternatives(own[name])
            b = self.alternatives(other["properties"][name])
            if all(self._is_apart(x, y) and self._is_apart(y, x) for x, y in product(a, b)):
                return True
        return False


def allows_more(plain: Plain) -> bool:
    """Whether an object may be written with properties that are not listed.

    Where a schema lists properties and does not say, none but these are written.
    """
    if "patternProperties" in plain:
        return True
    listed = "properties" in plain or bool(plain.get("required"))
    return plain.get("additionalProperties", not listed) is not False


def listed_properties(plain: Plain) -> dict[str, Any]:
    """The schemas of the properties that are listed or required, by name."""
    listed = dict(plain.get("properties", {}))
    for name in plain.get("required", ()):
        listed.setdefault(name, plain.get("additionalProperties", True))
    return listed


def types_of(plain: Plain) -> set[str]:
    """The types of a plain schema's values."""
    if "enum" not in plain:
        return {plain["type"]}
    return {next(kind for kind in TYPES if _is_a(value, kind)) for value in plain["enum"]}


def fits(value: Any, plain: Plain) -> bool:
    """Returns whether a value of an enumeration follows a plain schema.

    Raises:
        ValueError: If the schema has a part that is not supported beside an enumeration.
    """
    if "enum" in plain and not any(_equal(value, known) for known in plain["enum"]):
        return False
    kind = plain.get("type")
    if kind is not None and not _is_a(value, kind):
        return False
    if isinstance(value, str):
        if "patterns" in plain:
            raise ValueError('"enum" with "pattern" is not supported')
        return plain.get("minLength", 0) <= len(value) <= plain.get("maxLength", len(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            plain.get("minimum", value) <= value <= plain.get("maximum", value)
            and not value <= plain.get("exclusiveMinimum", value - 1)
            and not value >= plain.get("exclusiveMaximum", value + 1)
            and value % plain.get("multipleOf", 1 if isinstance(value, int) else value or 1) == 0
        )
    if isinstance(value, list | dict):
        further = plain.keys() - {"type", "enum"}
        if further:
            raise ValueError(
                f'"enum" of lists or objects with {", ".join(sorted(further))} is not supported'
            )
    return True


def _check(schema: Any) -> None:
    """Raises a ValueError if something is no schema, or one with a keyword that is not followed."""
    if not isinstance(schema, dict):
        raise ValueError(f"{schema!r:.40} is no schema")
    for name in schema:
        if name in _UNSUPPORTED:
            raise ValueError(f'"{name:.40}" is not supported')


def _joined(options: list[list[Plain]]) -> list[Plain]:
    return [plain for option in options for plain in option]


def _base(schema: dict[str, Any]) -> Plain:
    """The schema without notes, references, unions and intersections."""
    base = {name: value for name, value in schema.items() if name in _OF_TYPE or name == "type"}
    if "const" in schema or "enum" in schema:
        base["enum"] = _enumerated(schema)
    patterns = [schema["pattern"]] if "pattern" in schema else []
    if schema.get("format") in _FORMATS and "enum" not in base:
        patterns.append(_FORMATS[schema["format"]])
    if patterns:
        base["patterns"] = patterns
    _take_exclusive_bounds(base)
    if isinstance(base.get("items"), list):  # as before Draft 2020-12
        base["prefixItems"] = base.pop("items")
    if "propertyNames" in schema:
        _take_property_names(schema["propertyNames"], base)
    if schema.get("nullable") is True and "type" in base:  # as in OpenAPI
        base["type"] = [*_kinds(base), "null"]
    return base


def _enumerated(schema: dict[str, Any]) -> list[Any]:
    """The values of "enum" and "const"."""
    values = schema.get("enum", [schema.get("const")])
    if not isinstance(values, list):
        raise ValueError('"enum" must be a list')
    if "const" in schema:
        values = [value for value in values if _equal(value, schema["const"])]
    return values


def _take_exclusive_bounds(base: Plain) -> None:
    """Turns the switches of Draft 4 into the bounds of later drafts."""
    for name, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        is_exclusive = base.get(name)
        if is_exclusive is True:
            base[name] = base.pop(bound)
        elif is_exclusive is False:
            del base[name]


def _take_property_names(names: Any, base: Plain) -> None:
    limits = set() if isinstance(names, bool) else names.keys() - {"type", "description", "title"}
    if names is False or limits - {"pattern"}:
        raise ValueError('"propertyNames" is supported with a "pattern" alone')
    if "pattern" in limits:
        if base.get("properties") or "patternProperties" in base:
            raise ValueError('"propertyNames" beside other properties is not supported')
        base["patternProperties"] = {names["pattern"]: base.get("additionalProperties", True)}
        base["additionalProperties"] = False


def _merged(some: list[Plain], others: list[Plain]) -> list[Plain]:
    """The schemas of values that follow one of ``some`` and one of ``others``."""
    if len(some) * len(others) > MAX_ALTERNATIVES:
        raise ValueError(f"it has more than {MAX_ALTERNATIVES} alternatives")
    pairs = (_both(a, b) for a, b in product(some, others))
    return [plain for plain in pairs if plain is not None]


def _both(a: Plain, b: Plain) -> Plain | None:
    """The schema of values that follow both; None if there are none."""
    both = a | b
    if "type" in a and "type" in b:
        both["type"] = _common_kinds(a, b)
        if not both["type"]:
            return None
    if "enum" in a and "enum" in b:
        both["enum"] = [value for value in a["enum"] if any(_equal(value, v) for v in b["enum"])]
        if not both["enum"]:
            return None
    for name in a.keys() & b.keys() - {"type", "enum", "properties", "additionalProperties"}:
        both[name] = _both_values(name, a[name], b[name])
    if "properties" in both or "additionalProperties" in both:
        _merge_properties(a, b, both)
    return both


def _common_kinds(a: Plain, b: Plain) -> list[str]:
    """The types that both allow; an integer is a number, too."""
    kinds = [kind for kind in _kinds(a) if kind in _kinds(b)]
    either = _kinds(a) + _kinds(b)
    if "number" in either and "integer" in either and "integer" not in kinds:
        kinds.append("integer")
    return kinds


def _both_values(name: str, a: Any, b: Any) -> Any:
    """The value of a keyword that stands for its values in two schemas."""
    if name in _LOWER_BOUNDS:
        return max(a, b)
    if name in _UPPER_BOUNDS:
        return min(a, b)
    if name in ("patterns", "required"):
        return [*a, *(value for value in b if value not in a)]
    if name == "uniqueItems":
        return a or b
    if name == "items":
        return _all_of(a, b)
    if name in ("multipleOf", "prefixItems", "patternProperties") and a != b:
        raise ValueError(f'two values of "{name}" are not supported')
    return b


def _merge_properties(a: Plain, b: Plain, both: Plain) -> None:
    names = [*a.get("properties", {}), *b.get("properties", {})]
    if ("patternProperties" in both) and names:
        raise ValueError('"patternProperties" with "allOf" is not supported')
    if "properties" in both:
        both["properties"] = {
            name: _all_of(*(_property(plain, name) for plain in (a, b)))
            for name in dict.fromkeys(names)
        }
    more = [plain["additionalProperties"] for plain in (a, b) if "additionalProperties" in plain]
    if more:
        both["additionalProperties"] = _all_of(*more)


def _property(plain: Plain, name: str) -> Any:
    return plain.get("properties", {}).get(name, plain.get("additionalProperties", True))


def _all_of(*schemas: Any) -> Any:
    if any(schema is False for schema in schemas):
        return False
    limiting = [schema for schema in schemas if schema is not True and schema != {}]
    return limiting[0] if len(limiting) == 1 else {"allOf": limiting} if limiting else True


def _kinds(plain: Plain) -> list[str]:
    kinds = plain.get("type", [*TYPES])
    return kinds if isinstance(kinds, list) else [kinds]


def _of_one_type(plain: Plain) -> Iterator[Plain]:
    kinds = _kinds(plain)
    for kind in kinds:
        if kind not in TYPES:
            raise ValueError(f"the type {kind!r:.40} is not known")
    if "enum" in plain:
        allowed = _allowed_values(plain)
        if allowed:
            yield {"enum": allowed}
        return
    if "type" not in plain:  # what it says about objects is meant for an object, and so on
        implied = {_OF_TYPE.get(name) for name in plain} - {None}
        kinds = [kind for kind in kinds if kind in implied] or kinds
    if "number" in kinds and "integer" in kinds:
        kinds = [kind for kind in kinds if kind != "integer"]
    for kind in kinds:
        numeric = "number" if kind == "integer" else kind
        own = {name: value for name, value in plain.items() if _OF_TYPE.get(name) == numeric}
        yield {"type": kind, **own}


def _allowed_values(plain: Plain) -> list[Any]:
    """The values of an enumeration that follow the rest of its schema."""
    rest = {name: value for name, value in plain.items() if name not in ("type", "enum")}
    kinds = _kinds(plain)
    typed = [value for value in plain["enum"] if any(_is_a(value, kind) for kind in kinds)]
    return [value for value in typed if fits(value, rest)]


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and json.dumps(a) == json.dumps(b)


def _is_a(value: Any, kind: str) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "integer": is_number and value == int(value),
        "number": is_number,
        "boolean": isinstance(value, bool),
        "null": value is None,
    }[kind]


_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = (
    "([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    f"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# Formats of strings that are followed; others are notes, as JSON Schema has it.
_FORMATS: dict[Any, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "email": rf"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL})+$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "uuid": "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$",
    "uri": r"^[a-zA-Z][a-zA-Z0-9+.-]*:[A-Za-z0-9._~:/?#@!$&'()*+,;=%-]+$",
}
