"""What form an answer must have: OpenAI's ``response_format``, and ``regex`` and ``grammar``."""

import json
from collections.abc import Callable
from typing import Any

from ...structured.grammar import Grammar
from .errors import Problem
from .request_fields import Fields

# Characters of a schema, an expression or a grammar; OpenAI's limit for a schema is of this size.
MAX_CHARACTERS = 100_000
_FORMAT = "response_format"
_TEXTS = {"regex": Grammar.from_regex, "grammar": Grammar.from_lark}
_TYPES = ("text", "json_object", "json_schema", *_TEXTS)


def read_form(fields: Fields) -> Grammar | None:
    """The form of the answer; None for any text.

    ``regex`` and ``grammar`` may stand beside the other fields or within ``response_format``.

    Raises:
        Problem: If it cannot be followed, naming the place.
    """
    forms = [_response_format(fields.take(_FORMAT)), *(_text(fields, kind) for kind in _TEXTS)]
    grammars = [form for form in forms if form is not None]
    if len(grammars) > 1:
        raise Problem("An answer has one form: give response_format, regex or grammar.", _FORMAT)
    return grammars[0] if grammars else None


def _response_format(value: Any) -> Grammar | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _TYPES:
        raise Problem(f"{_FORMAT} must be an object with a type: {', '.join(_TYPES)}.", _FORMAT)
    fields = Fields({name: part for name, part in value.items() if name != "type"})
    form = None
    if kind == "json_object":
        form = _made(_FORMAT, Grammar.from_json_schema, {"type": "object"})
    elif kind == "json_schema":
        form = _json_schema(fields.take("json_schema"))
    elif kind in _TEXTS:
        form = _text(fields, kind, f"{_FORMAT}.")
        if form is None:
            raise Problem(f"{_FORMAT}.{kind} is missing.", _FORMAT)
    fields.end()
    return form


def _json_schema(value: Any) -> Grammar:
    where = f"{_FORMAT}.json_schema"
    if not isinstance(value, dict):
        raise Problem(f'{where} must be an object with a "name" and a "schema".', _FORMAT)
    fields = Fields(value)
    if not fields.take("name", str):
        raise Problem(f"{where}.name is missing.", _FORMAT)
    fields.take("description", str)
    fields.take("strict", bool)  # a schema is always kept to
    schema = fields.take("schema", default={"type": "object"})
    fields.end()
    return _made(f"{where}.schema", Grammar.from_json_schema, schema)


def _text(fields: Fields, kind: str, within: str = "") -> Grammar | None:
    text = fields.take(kind)
    return None if text is None else _made(f"{within}{kind}", _TEXTS[kind], text)


def _made(where: str, make: Callable[[Any], Grammar], value: Any) -> Grammar:
    field = where.split(".")[0]
    if len(json.dumps(value)) > MAX_CHARACTERS:
        raise Problem(f"{where} is longer than {MAX_CHARACTERS:,} characters: simplify it.", field)
    try:
        return make(value)
    except ValueError as error:
        raise Problem(f"{where}: {error}", field) from None
