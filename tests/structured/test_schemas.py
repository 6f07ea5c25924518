"""Schemas of arguments, as far as a grammar follows them; and what is said of the rest."""

import json
import random
import re
from decimal import Decimal

import pytest

from call_formats import of, tokenizer_of, tool
from mlx_flashhead.structured.dialects import BARE
from mlx_flashhead.structured.numbers import bounds_of, integer_regex, number_regex
from mlx_flashhead.structured.regexes import without
from mlx_flashhead.structured.tool_grammar import tool_calls
from mlx_flashhead.structured.vocabulary import llguidance, vocabulary_of

LIMITS = [0, 1, -1, 5, 10, 14, 99, 100, 123, -7, 0.5, 0.75, -1.5, 1.25, 20, 0.1, -0.05, -100]
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def fits(number, schema):
    return (
        Decimal(str(schema.get("minimum", "-inf"))) <= number
        and number <= Decimal(str(schema.get("maximum", "inf")))
        and not number <= Decimal(str(schema.get("exclusiveMinimum", "-inf")))
        and not number >= Decimal(str(schema.get("exclusiveMaximum", "inf")))
    )


def test_numbers_within_bounds():
    """Every number that fits is written, and none besides."""
    draw = random.Random(0)
    for _ in range(150):
        schema = {name: draw.choice(LIMITS) for name in BOUNDS if draw.random() < 0.4}
        lower, upper = bounds_of(schema)
        factor = draw.choice([1, 1, 5, 25, 8])
        integers, numbers = integer_regex(lower, upper, factor), number_regex(lower, upper)
        texts = {f"{draw.randint(-3000, 3000) / 10**n:.{n}f}" for n in range(4) for _ in range(15)}
        texts |= {str(limit) for limit in schema.values()}
        for text in texts:
            number = Decimal(text)
            if number == 0 and text.startswith("-"):
                continue
            right = fits(number, schema)
            assert bool(numbers and re.fullmatch(numbers, text)) == right, (schema, text)
            whole = right and "." not in text and number % factor == 0
            assert bool(integers and re.fullmatch(integers, text)) == whole, (schema, text)


def test_texts_without_marks():
    draw = random.Random(0)
    marks = ("</tool_call>", "</a>", "<|x|>", "}")
    expected = as_python(without(marks, BARE.other_than))
    parts = ["<", "</", "tool", "_call", ">", "</a", "|x|", "<|x", "}", "b", "</tool_call"]
    for _ in range(3000):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(0, 6)))
        assert bool(re.fullmatch(expected, text)) != any(mark in text for mark in marks), text


@pytest.mark.parametrize(
    "pattern, texts, others",
    [
        ("^a+$", ["a", "aaa"], ["", "ab", "ba"]),
        ("b", ["b", "abc", 'x"b'], ["", "ac"]),
        (r"^[^a-c\d]{2}$|x", ["zz", '"\\', "axb"], ["z1", "b"]),
        (r"^(?:a|b\.)\w?$", ["a", "b.", "a_"], ["b", "a."]),
        (r'^"\\/\x41\u0042$', ['"\\/AB'], ["AB"]),
        ("^(?<year>[0-9]{4})-.*?$", ["2026-", "2026-x"], ["2026"]),
    ],
)
def test_patterns(pattern, texts, others):
    """As a text is, and as JSON has it, in which some characters are escaped."""
    for text in texts:
        assert accepts(of(a={"type": "string", "pattern": pattern}), as_json(text)), text
    for text in others:
        assert not accepts(of(a={"type": "string", "pattern": pattern}), as_json(text)), text


def as_json(text):
    return json.dumps({"a": text}, ensure_ascii=False)


def as_python(regex):
    """A regular expression of Rust in Python's syntax."""
    return re.sub(r"\\x\{(\w+)\}", lambda match: rf"\U{int(match[1], 16):08x}", regex)


REFUSED = [
    ({"not": {}}, '"not" is not supported'),
    ({"properties": {"a": {"contains": {}}}}, '"contains" is not supported'),
    (of(a={"type": "string", "pattern": "(?=a)"}), "look-around"),
    (of(a={"type": "string", "pattern": "a^b"}), "an anchor in its midst"),
    (of(a={"type": "string", "pattern": r"(a)\1"}), r"has \1"),
    (of(a={"type": "string", "pattern": "("}), "is wrong"),
    (of(a={"type": "strin"}), "'strin' is not known"),
    (of(a={"$ref": "#/$defs/b"}), "does not exist"),
    (of(a={"$ref": "https://example.org/a"}), "not within the schema"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "points to itself"),
    (of(a={"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), '"oneOf"'),
    (of(a={"type": "array", "uniqueItems": True}), '"uniqueItems"'),
    (of(a={"type": "number", "multipleOf": 0.3}), '"multipleOf" 0.3'),
    (of(["a"], a=False), "required arguments cannot be written"),
    (of(["a"], a={"type": "integer", "minimum": 4, "maximum": 3}), "cannot be written"),
]


@pytest.mark.parametrize("schema, said", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_followed_is_said_with_the_tool(schema, said):
    with pytest.raises(ValueError, match=r"^The tool 'f' cannot be called: ") as refused:
        tool_calls(tokenizer_of("json_tools"), [tool("ping"), tool("f", schema)])
    assert said in str(refused.value) and str(refused.value).endswith(".")


@pytest.mark.parametrize(
    "parser, name, schema, said",
    [
        ("pythonic", "get-weather", {}, "has no such names"),
        ("pythonic", "class", {}, "a keyword of Python"),
        ("function_gemma", "f", of(["a"], a=of(b={})), "cannot be written"),
        ("function_gemma", "f", of(["a"], a={"type": "array", "minItems": 2}), "cannot be written"),
        ("qwen3_coder", "f", of(["a b"], **{"a b": {"type": "string"}}), "cannot be written"),
        ("minimax_m2", "f", of(["a"], a={"const": "null"}), "cannot be written"),
    ],
)
def test_what_a_format_cannot_carry_is_said(parser, name, schema, said):
    with pytest.raises(ValueError, match=said):
        tool_calls(tokenizer_of(parser), [tool(name, schema)])


def accepts(schema, text):
    """Whether a call with these arguments is a text of the grammar."""
    tokenizer = tokenizer_of("json_tools", plain=True)
    grammar = tool_calls(tokenizer, [tool("f", schema)]).section
    tokens = vocabulary_of(tokenizer).tokens
    matcher = llguidance().LLMatcher(tokens, grammar.compiled, log_level=0)
    call = f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'
    ids = tokens.greedy_tokenize(call)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


TREE = {"$defs": {"t": of(["v"], v={"type": "integer"}, l={"$ref": "#/$defs/t"})}}
ACCEPTED = [
    ({}, ['{"a": [1, {"b": null}]}', "{}"], ["[]"]),
    (of(a={}), ["{}", '{"a": 1}'], ['{"b": 1}']),
    (of(["b"], a={}, b={}, c={}), ['{"b": 1}', '{"a": 1,"b": 2, "c": 3}'], ["{}", '{"a": 1}']),
    (of(a={"type": "string"}), [r'{"a": "x\n\u00e9\"<b>"}', '{"a": "é"}'], ['{"a": 5}']),
    (of(a={"type": "string"}), [r'{"a": "<\/tool_call>"}'], ['{"a": "</tool_call>"}']),
    (of(a={"type": "string", "pattern": '^"[^\\n]\\\\$'}), [r'{"a": "\"x\\"}'], [r'{"a": "x"}']),
    (of(a={"type": "string", "minLength": 2, "maxLength": 3}), ['{"a": "é\\n"}'], ['{"a": "x"}']),
    (of(a={"format": "date"}), ['{"a": "2024-02-29"}'], ['{"a": "2023-02-29"}']),
    (of(a={"format": "phone"}), ['{"a": "1"}', '{"a": 1}'], []),
    (of(a={"enum": [1, "b", None]}), ['{"a": "b"}', '{"a": null}'], ['{"a": 2}']),
    (of(a={"type": ["string", "null"]}), ['{"a": null}'], ['{"a": 1}']),
    (of(a={"type": "string", "nullable": True}), ['{"a": null}'], ['{"a": true}']),
    (of(a={"prefixItems": [{"const": 1}, {"const": 2}], "items": False}), ['{"a": [1]}'], []),
    (of(a={"items": {"const": 1}, "maxItems": 2}), ['{"a": [1, 1]}'], ['{"a": [1, 1, 1]}']),
    (of(a={"items": {"enum": [1, 2]}, "uniqueItems": True}), ['{"a": [1, 2]}'], ['{"a": [1, 1]}']),
    (
        of(a={"type": "object", "propertyNames": {"pattern": "^x"}}),
        ['{"a": {"x1": 1}}', '{"a": {}}'],
        ['{"a": {"y": 1}}'],
    ),
    (
        of(x={}) | {"additionalProperties": {"type": "integer"}},
        ['{"x": "s", "y": 1}', '{"y": 2}'],
        ['{"y": "s"}', '{"y": 1, "x": "s"}'],
    ),
    (TREE | {"$ref": "#/$defs/t"}, ['{"v": 1, "l": {"v": 2}}'], ['{"v": 1, "l": {}}']),
    (
        {"allOf": [of(["a"], a={"minimum": 2}), of(["b"], a={"type": "integer"}, b={})]},
        ['{"a": 2, "b": 0}'],
        ['{"a": 1, "b": 0}', '{"a": 2}', '{"a": 2.5, "b": 0}'],
    ),
    (
        of(a={"oneOf": [of(["x"], x={"const": 1}), of(["x"], x={"const": 2}, y={})]}),
        ['{"a": {"x": 2, "y": 0}}', '{"a": {"x": 1}}'],
        ['{"a": {"x": 1, "y": 0}}'],
    ),
]


@pytest.mark.parametrize("schema, texts, others", ACCEPTED, ids=range(len(ACCEPTED)))
def test_arguments_that_follow_a_schema(schema, texts, others):
    for text in texts:
        assert accepts(schema, text), text
    for text in others:
        assert not accepts(schema, text), text
