"""Schemas of arguments, as far as a grammar follows them; and what is said of the rest."""

import json
import random
from decimal import Decimal

import pytest

from call_formats import of, tokenizer_of, tool
from mlx_flashhead.structured.grammar import Grammar
from mlx_flashhead.structured.processor import GrammarProcessor
from mlx_flashhead.structured.schemas import MAX_PARTS
from mlx_flashhead.structured.tool_grammar import tool_calls, tools_for_parser

LIMITS = [0, 1, -1, 5, 10, 14, 99, 100, 123, -7, 0.5, 0.75, -1.5, 1.25, 20, 0.1, -0.05, -100]
LIMITS += [10**15, 2**53 - 1, 1 - 2**53, 2.0**53 - 1, -1e15 - 0.5, 966548903076634.2]
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def fits(number, schema):
    return (
        Decimal(str(schema.get("minimum", "-inf"))) <= number
        and number <= Decimal(str(schema.get("maximum", "inf")))
        and not number <= Decimal(str(schema.get("exclusiveMinimum", "-inf")))
        and not number >= Decimal(str(schema.get("exclusiveMaximum", "inf")))
    )


def test_numbers_within_bounds():
    """No other number is written."""
    draw = random.Random(0)
    n_followed = 0
    for _ in range(150):
        schema = {name: draw.choice(LIMITS) for name in BOUNDS if draw.random() < 0.4}
        kind = draw.choice(["integer", "number"])
        texts = {f"{draw.randint(-3000, 3000) / 10**n:.{n}f}" for n in range(4) for _ in range(8)}
        for limit in schema.values():
            texts |= {str(Decimal(repr(limit)) + Decimal(more)) for more in ("-1", "0", "0.1", "1")}
        try:
            written = {f'{{"a": {text}}}': text for text in texts}
            accepted = accepts_one_of(of(a={"type": kind, **schema}), written)
        except ValueError:
            # No number fits the schema.
            continue
        n_followed += 1
        for arguments in accepted:
            text = written[arguments]
            number = Decimal(text)
            assert fits(number, schema), (kind, schema, text)
            if kind == "integer":
                assert number % 1 == 0, (schema, text)
    assert n_followed > 50


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


ITSELF = {"$ref": "#/$defs/a"}


def nested_references(n):
    """References to alternatives, of which one refers to alternatives, and so on."""
    defs = {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(n)}
    last = {f"d{n}": {"type": "string"}}
    return of(a={"oneOf": [{"$ref": "#/$defs/d0"}]}) | {"$defs": defs | last}


ENDLESS = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/a"}}}
LISTED = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/b"}}
REFUSED = [
    (of(a={"multipleOf": 1_000_003}), '"multipleOf" 1000003 makes the least common multiple'),
    (of(a={"multipleOf": 9973}, b={"multipleOf": 99.1}), "of all of them larger than 10,000"),
    (of(a={"multipleOf": 0}), '"multipleOf" is 0: it must be more than 0'),
    (of(a={"multipleOf": 10**15}), '"multipleOf" has too many digits: take a rounder number'),
    (of(a={"maximum": 2**53}), '"maximum" is 9007199254740992: it must be within'),
    (of(a={"exclusiveMinimum": -1e300}), '"exclusiveMinimum" is -1e+300: it must be within'),
    ({"$ref": "#/$defs/a", "$defs": {"a": ENDLESS}}, "what it requires refers to itself"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [ENDLESS, LISTED]}, "b": ENDLESS}},
        "what it requires refers to itself",
    ),
    *[
        ({"$ref": "#/$defs/a", "$defs": {"a": schema}}, "what it requires refers to itself")
        for schema in (
            {"allOf": [{"type": "object", "properties": {"a": ITSELF}}, {"required": ["a"]}]},
            {"type": ["object"], "properties": {"a": ITSELF}, "required": ["a"]},
            {"type": "object", "additionalProperties": ITSELF, "minProperties": 1},
            {"type": "object", "patternProperties": {"^a": ITSELF}, "required": ["a"]}
            | {"additionalProperties": False},
            {"type": "array", "items": [ITSELF], "minItems": 1},
        )
    ],
    (nested_references(60), "it is nested too deeply: simplify it"),
    (nested_references(2000), "it is nested too deeply: simplify it"),
    (of(a={"minlength": 3}), '"minlength" is no keyword of JSON Schema: write "minLength"'),
    (of(a={"any_of": [{}]}), '"any_of" is no keyword of JSON Schema: write "anyOf"'),
    (of(a={"enums": ["a"]}), '"enums" is no keyword of JSON Schema: write "enum"'),
    (of(a={"maxLenght": 3}), '"maxLenght" is no keyword of JSON Schema: write "maxLength"'),
    (of(a={"enum": ["x" * 1_000_001]}), "more than 1,000,000 characters"),
    ({"not": {}}, '"not" is not supported'),
    ({"properties": {"a": {"contains": {}}}}, '"contains" is not supported'),
    ({"dependentRequired": {"a": ["b"]}}, '"dependentRequired" is not supported'),
    (of(a={"type": "string", "pattern": "(?=a)"}), "look-around"),
    (of(a={"type": "string", "pattern": "a^b"}), "lookarounds not supported"),
    (of(a={"type": "string", "pattern": r"(a)\1"}), "backreferences are not supported"),
    (of(a={"type": "string", "pattern": "("}), "unclosed group"),
    (of(a={"type": "strin"}), "Invalid type: strin"),
    (of(a={"$ref": "#/$defs/b"}), "'/$defs/b' does not exist"),
    (of(a={"$ref": "https://example.org/a"}), "is not present"),
    (
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "what it requires refers to itself",
    ),
    (of(a={"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), '"oneOf"'),
    (of(a={"type": "array", "uniqueItems": True}), '"uniqueItems"'),
    (of(a={"type": "object", "minProperties": 2}), '"minProperties"'),
    (of(["a"], a=False), "required property 'a' is unsatisfiable"),
    (of(["a"], a={"type": "integer", "minimum": 4, "maximum": 3}), "'a' is unsatisfiable"),
    (of(a={"anyOf": [{}] * MAX_PARTS}), "50,000 parts"),
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
        ("pythonic", "class", {}, "has no such names"),
        ("function_gemma", "f", of(["a"], a=of(b={})), "has no such argument as 'a'"),
        ("function_gemma", "f", of(["a"], a={"type": "array"}), "has no such argument as 'a'"),
        (
            "qwen3_coder",
            "f",
            of(["a b"], **{"a b": {"type": "string"}}),
            "no such argument as 'a b'",
        ),
        ("minimax_m2", "f", of(["a"], a={"const": "null"}), "has no such argument as 'a'"),
        ("glm47", "f", {"anyOf": [of(a={}), of(b={})]}, '"anyOf" of an object is not supported'),
        ("gemma4", "f", {"allOf": [of(a={}), of(b={})]}, '"allOf" of an object is not supported'),
        ("gemma4", "f", of(a={"prefixItems": [{}]}), "a list of listed items cannot be written"),
    ],
)
def test_what_a_format_cannot_carry_is_said(parser, name, schema, said):
    with pytest.raises(ValueError, match=said):
        tool_calls(tokenizer_of(parser), [tool(name, schema)])


def diamond(combined, n=40):
    """Two references to what has two references, and so on: 2⁴⁰ paths in 3 kB."""
    defs = {f"d{i}": {combined: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return of(a={"$ref": "#/$defs/d0"}) | {"$defs": defs | {f"d{n}": {"type": "string"}}}


def values(n, begin=0):
    return {"enum": [f"v{i:05}" for i in range(begin, begin + n)]}


def long_diamond(keyword="enum", n=12):
    """References to 2¹² times the same long values: few steps, and many characters."""
    kind = "object" if keyword == "required" else "string"
    long = {keyword: ["x" * 30_000], "type": kind}
    defs = {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return of(a={"$ref": "#/$defs/d0"}) | {"$defs": defs | {f"d{n}": long}}


def deep_values(levels=60):
    """Long values within objects in objects, which a format may write at each level."""
    schema = {"enum": ["x" * 100_000]}
    for _ in range(levels):
        schema = of(["a"], a=schema)
    return schema


COUNTED = "((((a{100}){100}){100}){100})"
HOSTILE = {
    "diamond of anyOf": diamond("anyOf"),
    "diamond of allOf": diamond("allOf"),
    "diamond of oneOf": diamond("oneOf"),
    "diamond of long values": long_diamond(),
    "diamond of long names": long_diamond("required"),
    "long values, deep": deep_values(),
    "diamond of arguments": {"$ref": "#/$defs/d0", "$defs": diamond("allOf")["$defs"]},
    "enums in allOf": of(a={"allOf": [values(3000), values(3000, 1500)]}),
    "enums in oneOf": of(a={"oneOf": [values(9000), values(9000, 9000)]}),
    "objects in allOf": of(a={"allOf": [of(**{f"p{i}": {}}) for i in range(3000)]}),
    "arguments in allOf": {"allOf": [of(**{f"p{i}": {}}) for i in range(3000)]},
    "counts": of(["a"], a={"type": "string", "pattern": f"^{COUNTED}$"}),
    "references": of(**{f"p{i}": {"$ref": f"#/$defs/{'d' * 999}{i}"} for i in range(200)})
    | {"$defs": {f"{'d' * 999}{i}": {"type": "string"} for i in range(200)}},
}


@pytest.mark.parametrize("parser", ["json_tools", "qwen3_coder", "gemma4", "pythonic"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_schema_is_followed_or_refused_after_so_many_steps(parser, hostile):
    tokenizer = tokenizer_of(parser)
    tools = [tool("f", HOSTILE[hostile])]
    try:
        calls = tool_calls(tokenizer, tools)
        tools_for_parser(tokenizer, tools)
        processor = GrammarProcessor(tokenizer, calls=calls, required=True)
    except ValueError as refused:
        assert str(refused).startswith("The tool 'f' cannot be called: ")
    else:
        assert processor.allowed([0], 300) is not None


def test_what_a_text_is_forced_to_is_bounded():
    for make, source in ((Grammar.from_regex, COUNTED), (Grammar.from_lark, f"start: /{COUNTED}/")):
        with pytest.raises(ValueError, match="no choice for more than 10,000 bytes"):
            make(source)


def accepts_one_of(schema, texts):
    """Those of some arguments, of a call by a name, that a grammar allows."""
    tokenizer = tokenizer_of("json_tools", plain=True)
    calls = tool_calls(tokenizer, [tool("f", schema)])
    processor = GrammarProcessor(tokenizer, calls=calls, required=True)
    whole = '<tool_call>{{"name": "f", "arguments": {}}}</tool_call>'
    return [text for text in texts if processor.accepts(whole.format(text))]


def accepts(schema, text):
    """Whether a call with these arguments is a text of the grammar."""
    return accepts_one_of(schema, [text]) == [text]


TREE = {"$defs": {"t": of(["v"], v={"type": "integer"}, l={"$ref": "#/$defs/t"})}}
APART = {
    "$defs": {
        "one": of(["x"], x={"const": "1"}),
        "two": of(["x"], x={"const": "2"}, y={"$ref": "#/$defs/two"}),
    }
}
ACCEPTED = [
    ({}, ['{"a": [1, {"b": null}]}', "{}"], ["[]"]),
    (of(a={}), ["{}", '{"a": 1}'], ['{"b": 1}']),
    (of(["b"], a={}, b={}, c={}), ['{"b": 1}', '{"a": 1,"b": 2, "c": 3}'], ["{}", '{"a": 1}']),
    (of(a={"type": "string"}), [r'{"a": "x\n\u0001\"<b>"}', '{"a": "é"}'], ['{"a": 5}']),
    (of(a={"type": "string", "pattern": '^"[^\\n]\\\\$'}), [r'{"a": "\"x\\"}'], [r'{"a": "x"}']),
    (of(a={"type": "string", "minLength": 2, "maxLength": 3}), ['{"a": "é\\n"}'], ['{"a": "x"}']),
    (of(a={"format": "date"}), ['{"a": "2024-02-29"}'], ['{"a": "2024-02-30"}']),
    (of(a={"format": "phone"}), ['{"a": "1"}', '{"a": 1}'], []),
    (of(a={"discriminator": {"propertyName": "types", "mapping": {"enums": "b"}}}), ["{}"], []),
    (of(a={"multipleOf": 8192, "type": "number"}), ['{"a": 16384}'], ['{"a": 16383}']),
    (of(a={"enum": [1, "b", None]}), ['{"a": "b"}', '{"a": null}'], ['{"a": 2}']),
    (of(a={"type": ["string", "null"]}), ['{"a": null}'], ['{"a": 1}']),
    (of(a={"prefixItems": [{"const": 1}, {"const": 2}], "items": False}), ['{"a": [1]}'], []),
    (of(a={"items": {"const": 1}, "maxItems": 2}), ['{"a": [1, 1]}'], ['{"a": [1, 1, 1]}']),
    (of(a={"type": "array", "uniqueItems": False}), ['{"a": [1, 1]}'], ['{"a": 2}']),
    (
        of(a={"type": "object", "propertyNames": {"type": "string"}, "minProperties": 1}),
        ['{"a": {"x": 1}}'],
        ['{"a": {}}'],
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
        of(a={"oneOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}]}) | APART,
        ['{"a": {"x": "2", "y": {"x": "2"}}}', '{"a": {"x": "1"}}'],
        ['{"a": {"x": "3"}}', '{"a": {"x": "2", "y": {"x": "1"}}}'],
    ),
]


@pytest.mark.parametrize("schema, texts, others", ACCEPTED, ids=range(len(ACCEPTED)))
def test_arguments_that_follow_a_schema(schema, texts, others):
    for text in texts:
        assert accepts(schema, text), text
    for text in others:
        assert not accepts(schema, text), text
