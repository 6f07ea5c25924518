"""``response_format``, ``regex`` and ``grammar``: what is followed, and what is refused."""

import pytest

from mlx_flashhead.serving.protocol.errors import Problem
from mlx_flashhead.serving.protocol.response_format import MAX_CHARACTERS
from served_models import checked

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LARK = 'start: "yes" | "no"'


def read(served, **fields):
    return checked(served, {"messages": [{"role": "user", "content": "One day"}]} | fields).form


def json_schema(schema, **further):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | further}


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "JSON schema"),
        ({"response_format": json_schema(SCHEMA, strict=True, description="y")}, "JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "JSON schema"),
        ({"response_format": {"type": "regex", "regex": "a+"}}, "regular expression"),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, "grammar"),
        ({"regex": "a+"}, "regular expression"),
        ({"grammar": LARK, "response_format": {"type": "text"}}, "grammar"),
    ],
)
def test_forms(tiny, fields, kind):
    form = read(tiny, **fields)
    assert (None if form is None else form.kind) == kind


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema, regex"),
        ({"response_format": {"type": ["text"]}}, "response_format", "with a type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "must be an object"),
        ({"response_format": json_schema(5)}, "response_format", "must be an object"),
        ({"response_format": json_schema(False)}, "response_format", "which no text fits"),
        ({"response_format": json_schema(SCHEMA, name=None)}, "response_format", "name is missing"),
        ({"response_format": {"type": "regex"}}, "response_format", "regex is missing"),
        (
            {"response_format": json_schema({"properties": {"a": {"type": "x"}}})},
            "response_format",
            "response_format.json_schema.schema: The JSON schema is wrong at /properties/a",
        ),
        ({"regex": "("}, "regex", "unclosed group"),
        ({"regex": 5}, "regex", "must be a text"),
        ({"grammar": "start: x"}, "grammar", "line 1, column 8"),
        ({"regex": "a" * MAX_CHARACTERS}, "regex", "longer than"),
        ({"regex": "a", "grammar": LARK}, "response_format", "one form"),
        ({"response_format": {"type": "text", "x": 1}}, "x", "not a field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_name_the_place(tiny, fields, field, said):
    with pytest.raises(Problem) as told:
        read(tiny, **fields)
    assert (told.value.field, told.value.status) == (field, 400)
    assert said in str(told.value)


def test_no_tools_beside_a_form(chain):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with pytest.raises(Problem, match="calls no tools"):
        read(chain, regex="a", tools=tools)
    assert read(chain, regex="a", tools=tools, tool_choice="none") is not None
