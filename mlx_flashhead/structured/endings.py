"""Whether a value of a JSON schema can end, since what it requires may refer to itself."""

from collections.abc import Callable
from typing import Any

ROOT = "#/$defs/root"


class Endings:
    """What is known of the ends of a schema's values.

    A reference is taken for endless until what it points at is seen to end without it.

    Args:
        root: The schema, whose references begin with ``ROOT``.
        at: Finds what a reference points at.
        count: Is called for each part that is looked at. It may raise a ValueError.
    """

    def __init__(self, root: Any, at: Callable[[str], Any], count: Callable[[], None]):
        self._root = root
        self._at = at
        self._count = count
        # References. The list grows by those that one of them meets.
        self._met: list[str] = []
        # Whether it is known of a reference that it ends.
        self._ending: dict[str, bool] = {}

    def check(self) -> None:
        """Raises a ValueError if no value ends."""
        while not self._ends(self._root):
            known = self._known
            # Forth, to all that they meet.
            for reference in self._met:
                self._look_at(reference)
            for reference in reversed(self._met):
                self._look_at(reference)
            if known == self._known:
                raise ValueError("no text fits it, since what it requires refers to itself")

    @property
    def _known(self) -> tuple[int, int]:
        """How many references have been met, and how many are seen to end."""
        return len(self._met), sum(self._ending.values())

    def _look_at(self, reference: str) -> None:
        self._ending[reference] = self._ends(self._at(reference))

    def _ends(self, schema: Any) -> bool:
        """Whether a value of a schema may end, as far as that is known of references."""
        self._count()
        if not isinstance(schema, dict):
            return True
        parts = self._parts(schema)
        for part in parts:
            if not part.keys().isdisjoint(("enum", "const")):
                return True
            reference = _reference(part)
            if reference is not None and not self._is_ending(reference):
                return False
        return all(any(map(self._ends, group)) for group in self._groups(parts))

    def _is_ending(self, reference: str) -> bool:
        if reference not in self._ending:
            self._ending[reference] = False
            self._met.append(reference)
        return self._ending[reference]

    def _parts(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The schemas of which a value follows all: itself, those in ``allOf``, and references'.

        A schema that only refers to another one is a part by itself.
        """
        while schema.keys() == {"allOf"} and len(_listed(schema, "allOf")) == 1:
            inner = schema["allOf"][0]
            if not isinstance(inner, dict):
                break
            schema = inner
        if schema.keys() == {"$ref"}:
            return [schema]
        parts: list[dict[str, Any]] = []
        left: list[Any] = [schema]
        followed: set[str] = set()
        while left:
            self._count()
            part = left.pop()
            if not isinstance(part, dict):
                continue
            parts.append(part)
            left += _listed(part, "allOf")
            reference = _reference(part)
            if reference is not None and reference not in followed:
                followed.add(reference)
                left.append(self._at(reference))
        return parts

    def _groups(self, parts: list[dict[str, Any]]) -> list[list[Any]]:
        """Groups of schemas, of which a value that follows all parts needs one each."""
        groups = []
        for part in parts:
            for name in ("anyOf", "oneOf"):
                alternatives = _listed(part, name)
                if alternatives:
                    groups.append(alternatives)
        types = _types(parts)
        if types == {"object"}:
            groups += self._groups_of_members(parts)
        if types == {"array"}:
            groups += _groups_of_items(parts)
        return groups

    def _groups_of_members(self, parts: list[dict[str, Any]]) -> list[list[Any]]:
        """Those of an object."""
        required = _required(parts)
        groups = []
        for part in parts:
            members = _named(part, "properties")
            others = [*_named(part, "patternProperties").values()]
            if part.get("additionalProperties", {}) is not False:
                others.append(part.get("additionalProperties"))
            for name in required:
                self._count()
                group = others
                if name in members:
                    group = [members[name]]
                groups.append(group)
            fewest = part.get("minProperties")
            if not required and isinstance(fewest, int) and fewest > 0:
                groups.append([*members.values(), *others])
        return [group for group in groups if group]


def _reference(part: dict[str, Any]) -> str | None:
    """The reference of a schema into the root."""
    reference = part.get("$ref")
    if isinstance(reference, str) and reference.startswith(ROOT):
        return reference
    return None


def _types(parts: list[dict[str, Any]]) -> set[str]:
    """The types that a value may have; none if all are allowed."""
    types: set[str] = set()
    for part in parts:
        named = part.get("type")
        if isinstance(named, str):
            named = [named]
        if isinstance(named, list):
            allowed = {each for each in named if isinstance(each, str)}
            types = types & allowed or allowed
    return types


def _required(parts: list[dict[str, Any]]) -> set[str]:
    """The names of the members that an object must have."""
    names = set()
    for part in parts:
        names |= {name for name in _listed(part, "required") if isinstance(name, str)}
    return names


def _groups_of_items(parts: list[dict[str, Any]]) -> list[list[Any]]:
    """Groups of schemas, of which a list that follows all parts needs one each."""
    fewest = 0
    for part in parts:
        if isinstance(part.get("minItems"), int):
            fewest = max(fewest, part["minItems"])
    groups = []
    for part in parts:
        first = _listed(part, "prefixItems") or _listed(part, "items")
        others = part.get("items")
        if isinstance(others, list):
            others = part.get("additionalItems")
        groups += [[schema] for schema in [*first, others][:fewest]]
    return groups


def _listed(schema: dict[str, Any], name: str) -> list[Any]:
    """A list of a schema; empty if it has none."""
    value = schema.get(name)
    if isinstance(value, list):
        return value
    return []


def _named(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """The schemas by name of a schema; empty if it has none."""
    value = schema.get(name)
    if isinstance(value, dict):
        return value
    return {}
