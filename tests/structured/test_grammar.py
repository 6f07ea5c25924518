"""Schemas, expressions and grammars: what is followed, and how a wrong one is explained."""

import sys
from functools import reduce

import pytest

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


def test_grammars_of_the_greatest_size_are_followed():
    assert Grammar.from_lark(chain(998)) and Grammar.from_json_schema(references(990))


@pytest.mark.parametrize("of_terminals", [False, True])
def test_a_grammar_that_ends_the_process_of_llguidance_is_refused(of_terminals):
    text = chain(10_000).replace(": r", ': "b" r')
    if of_terminals:
        text = text.replace("r", "R").replace("staRt", "start")
    # It is refused again when it comes again.
    for _ in range(2):
        with pytest.raises(ValueError, match="too complex for the library"):
            Grammar.from_lark(text)


SCHEMA = Grammar.from_json_schema
REGEX = Grammar.from_regex
LARK = Grammar.from_lark


@pytest.mark.parametrize(
    "read, text, said",
    [
        (SCHEMA, {"type": "objekt"}, "The JSON schema is wrong: .*objekt"),
        (SCHEMA, {"properties": {"a": {"type": "numbr"}}}, "numbr"),
        (SCHEMA, {"properties": {"a": {"pattern": "("}}}, "unclosed group"),
        (SCHEMA, {"type": "number", "minimum": 5, "maximum": 1}, "greater"),
        (SCHEMA, {"properties": {"a": {"if": {}}}}, '"if" is not supported'),
        (SCHEMA, {"items": {"$ref": "#/$defs/x"}}, "does not exist"),
        (SCHEMA, nested(450), "it is nested too deeply: simplify it"),
        (SCHEMA, nested(5000), "it is nested too deeply: simplify it"),
        (SCHEMA, references(2600), "is too complex for the library that reads it: simplify it"),
        (SCHEMA, [], "must be an object"),
        (REGEX, "a(b", "unclosed group"),
        (REGEX, "(?=a)b", "look-around"),
        (REGEX, "", "must be a text"),
        (REGEX, 7, "is 7"),
        (REGEX, "a\\x00", "the character 0"),
        (REGEX, "\0", "the character 0"),
        (LARK, "start: foo", 'line 1, column 8: unknown name: "foo"'),
        (LARK, 'start: "a"\nb: (', "line 2"),
        (LARK, 'x: "a"', "no start rule"),
        (LARK, " ", "must be a text"),
        (LARK, chain(2800), "is too complex for the library that reads it: simplify it"),
    ],
    ids=range(21),
)
def test_what_is_wrong_is_one_sentence(read, text, said):
    with pytest.raises(ValueError, match=said) as raised:
        read(text)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_without_llguidance(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx_flashhead\[structured\]'"):
        llguidance()
