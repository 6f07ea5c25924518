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
_GRAMMARS: dict[str, Callable[[Any], Grammar]] = {
    "json_schema": Grammar.from_json_schema,
    "regex": Grammar.from_regex,
    "grammar": Grammar.from_lark,
}
_TYPES = ("text", "json_object", *_GRAMMARS)
_Form = tuple[str, str, Any]  # its place in the request, its kind, and what describes it


def read_form(fields: Fields) -> Grammar | None:
    """The form of the answer; None for any text.

    ``regex`` and ``grammar`` may stand beside the other fields or within ``response_format``.
    """
    alone = [(kind, kind, fields.take(kind)) for kind in ("regex", "grammar")]
    forms = [form for form in alone if form[2] is not None]
    forms += _response_format(fields.take(_FORMAT))
    if len(forms) > 1:
        raise Problem("An answer has one form: give response_format, regex or grammar.", _FORMAT)
    if not forms:
        return None
    ((where, kind, value),) = forms
    field = where.split(".")[0]
    if len(json.dumps(value)) > MAX_CHARACTERS:
        raise Problem(f"{where} is longer than {MAX_CHARACTERS:,} characters: simplify it.", field)
    try:
        return _GRAMMARS[kind](value)
    except ValueError as error:
        raise Problem(f"{where}: {error}", field) from None


def _response_format(value: Any) -> list[_Form]:
    """The form in ``response_format``, if there is one."""
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _TYPES:
        raise Problem(f"{_FORMAT} must be an object with a type: {', '.join(_TYPES)}.", _FORMAT)
    fields, where = Fields(value), f"{_FORMAT}.{kind}"
    fields.take("type")
    forms: list[_Form] = []
    if kind == "json_object":
        forms = [(_FORMAT, "json_schema", {"type": "object"})]
    elif kind == "json_schema":
        forms = [(f"{where}.schema", kind, _schema(fields.take(kind), where))]
    elif kind != "text":
        forms = [(where, kind, fields.take(kind))]
        if forms[0][2] is None:
            raise Problem(f"{where} is missing.", _FORMAT)
    fields.end()
    return forms


def _schema(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise Problem(f'{where} must be an object with a "name" and a "schema".', _FORMAT)
    fields = Fields(value)
    if not fields.take("name", str):
        raise Problem(f"{where}.name is missing.", _FORMAT)
    fields.take("description", str)
    fields.take("strict", bool)  # a schema is always kept to
    schema = fields.take("schema", default={"type": "object"})
    fields.end()
    return schema
