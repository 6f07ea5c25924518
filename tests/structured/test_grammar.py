"""Schemas, expressions and grammars: what is followed, and how a wrong one is explained."""

import sys
from functools import reduce

import pytest

from mlx_flashhead.structured import grammar
from mlx_flashhead.structured.grammar import Grammar, llguidance


def nested(levels):
    return reduce(lambda schema, _: {"items": schema}, range(levels), {})


def chain(n):
    """A Lark grammar of so many rules that call each other."""
    return "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(n)), f'r{n}: "a"'])


def references(n):
    """A JSON schema of as many references."""
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": defs | {f"d{n}": {"type": "string"}}}


@pytest.mark.parametrize(
    "schema, said",
    [
        ({"type": "objekt"}, "objekt"),
        ({"properties": {"a": {"type": "numbr"}}}, "numbr"),
        ({"properties": {"a": {"pattern": "("}}}, "unclosed group"),
        ({"type": "number", "minimum": 5, "maximum": 1}, "greater"),
        ({"properties": {"a": {"if": {}}}}, '"if" is not supported'),
        ({"uniqueItems": True}, '"uniqueItems" is not supported'),
        ({"items": {"$ref": "#/$defs/x"}}, "does not exist"),
        (nested(450), "recursion"),
        (nested(5000), "maximum recursion depth"),
        (references(2600), "has 2,601 rules and references, and at most 1,000 are followed"),
    ],
    ids=range(10),
)
def test_wrong_schema(schema, said):
    with pytest.raises(ValueError) as raised:
        Grammar.from_json_schema(schema)
    message = str(raised.value)
    assert message.startswith("The JSON schema is wrong: ")
    assert said in message and message.endswith(".") and "\n" not in message


def test_grammars_of_the_greatest_size_are_followed():
    assert Grammar.from_lark(chain(998)) and Grammar.from_json_schema(references(990))


@pytest.mark.parametrize("of_terminals", [False, True])
def test_a_grammar_that_ends_the_process_of_llguidance_is_refused(monkeypatch, of_terminals):
    monkeypatch.setattr(grammar, "MAX_RULES", 10**6)
    text = chain(10_000).replace(": r", ': "b" r')
    text = text.replace("r", "R").replace("staRt", "start") if of_terminals else text
    for _ in range(2):  # also if it comes again
        with pytest.raises(ValueError, match="too complex for the library"):
            Grammar.from_lark(text)


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
        (Grammar.from_lark, chain(2800), "has 2,802 rules and references, and at most 1,000"),
    ],
)
def test_wrong_expressions_and_grammars(read, text, said):
    with pytest.raises(ValueError) as raised:
        read(text)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_without_llguidance(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx_flashhead\[structured\]'"):
        llguidance()
