"""Schemas, expressions and grammars: what is followed, and what a wrong one is told."""

import sys

import pytest

from mlx_flashhead.structured import grammar
from mlx_flashhead.structured.grammar import Grammar, GrammarError, llguidance


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema, place, said",
    [
        ({"type": "objekt"}, "its top", "objekt"),
        ({"properties": {"a": {"type": "numbr"}}}, "/properties/a", "numbr"),
        ({"properties": {"a/b~": {"type": "x"}}}, "/properties/a~1b~0", "x"),
        ({"properties": {"a": {"pattern": "("}}}, "/properties/a", "unclosed group"),
        ({"items": {"anyOf": [{}, {"type": "nope"}]}}, "/items/anyOf/1", "nope"),
        ({"type": "number", "minimum": 5, "maximum": 1}, "its top", "greater"),
        ({"properties": {"a": {"if": {}}}}, "/properties/a", '"if" is not supported'),
        ({"uniqueItems": True}, "its top", '"uniqueItems" is not supported'),
        (
            {"$defs": {"t": {"items": {"$ref": "#/$defs/x"}}}, "items": {"$ref": "#/$defs/t"}},
            "/$defs/t/items",
            "does not exist",
        ),
        (nested(450), "/items/items/items", "recursion"),
        (nested(5000), "its top", "nested too deeply"),
        ({"items": {"type": "y"}, "properties": {"b": {"type": "z"}}}, "/", "Invalid type"),
    ],
)
def test_wrong_schema_names_the_place(schema, place, said):
    with pytest.raises(GrammarError) as raised:
        Grammar.from_json_schema(schema)
    message = str(raised.value)
    assert message.startswith(f"The JSON schema is wrong at {place}")
    assert said in message and message.endswith(".") and "\n" not in message


def test_the_search_for_the_place_is_bounded(monkeypatch):
    compiled = []
    compile_schema = grammar._compile_schema
    monkeypatch.setattr(
        grammar, "_compile_schema", lambda schema: compiled.append(0) or compile_schema(schema)
    )
    with pytest.raises(GrammarError, match='"not" is not supported'):
        Grammar.from_json_schema({"allOf": [{"not": {}}] * 900})
    assert len(compiled) <= 1 + grammar.MAX_COMPILED


@pytest.mark.parametrize(
    "read, text, said",
    [
        (Grammar.from_json_schema, [], "must be an object"),
        (Grammar.from_json_schema, None, "must be an object"),
        (Grammar.from_regex, "a(b", "unclosed group"),
        (Grammar.from_regex, "(?=a)b", "look-around"),
        (Grammar.from_regex, "", "must be a text"),
        (Grammar.from_regex, 7, "is 7"),
        (Grammar.from_regex, "a\\x00", "the character 0"),
        (Grammar.from_regex, "\0", "the character 0"),
        (Grammar.from_lark, "start: foo", 'line 1, column 8: unknown name: "foo"'),
        (Grammar.from_lark, 'start: "a"\nb: (', "line 2"),
        (Grammar.from_lark, 'x: "a"', "no start rule"),
        (Grammar.from_lark, " ", "must be a text"),
    ],
)
def test_wrong_expressions_and_grammars(read, text, said):
    with pytest.raises(GrammarError) as raised:
        read(text)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_without_llguidance(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx_flashhead\[structured\]'"):
        llguidance()
