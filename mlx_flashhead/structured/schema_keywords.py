"""Keywords of JSON schemas that llguidance follows, and what is likely to be meant by others."""

# Keywords that limit values, by the type that they limit.
LIMITS_OF = {
    "object": ("properties", "required", "additionalProperties", "patternProperties",
               "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
COMBINED = {"$ref", "allOf", "anyOf", "oneOf"}
LIMITS = {"type", "enum", "const"}.union(COMBINED, *LIMITS_OF.values())
# Those below which there are schemas, or which are followed.
KEYWORDS = LIMITS | {"$defs", "definitions", "format", "uniqueItems", "propertyNames"}
# A shorter one has too many neighbours among words that somebody may use for a note.
_SHORTEST = 6
_LONGEST = max(map(len, KEYWORDS)) + 1


def check_keyword(name: str) -> None:
    """Raises a ValueError if a name is a mistyped keyword, which llguidance would take for a note.

    Differences in capitals, underscores and hyphens count, and one wrong, missing or additional
    letter, two in the wrong order, or an s at the end.
    """
    if name in KEYWORDS or len(name) > 2 * _LONGEST:
        return
    letters = _letters_of(name)
    if len(letters) > _LONGEST:
        return
    for neighbour in _neighbours(letters):
        meant = _MEANT.get(neighbour)
        if meant is not None:
            raise ValueError(f'"{name}" is no keyword of JSON Schema: write "{meant}"')


def _letters_of(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _neighbours(letters: str) -> list[str]:
    """A name, and what it becomes without one of its letters; of a short one, without an s."""
    found = [letters]
    if len(letters) >= _SHORTEST:
        found += [letters[:i] + letters[i + 1 :] for i in range(len(letters))]
    elif letters.endswith("s"):
        found.append(letters[:-1])
    return found


# Two names that differ by one letter have a neighbour in common.
_MEANT = {
    neighbour: name for name in sorted(KEYWORDS) for neighbour in _neighbours(_letters_of(name))
}
