"""A tokenizer for each of mlx-lm's tool parsers, and tools with schemas of many kinds."""

import importlib
import pkgutil
from functools import cache

from mlx_lm import tool_parsers
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PARSERS = sorted(module.name for module in pkgutil.iter_modules(tool_parsers.__path__))
# The marks that are tokens of their own in the models of a format; the other ones are plain text.
TOKENS = {
    "function_gemma": ["<start_function_call>", "<end_function_call>", "<escape>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "glm47": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>"],
    "json_tools": ["<tool_call>", "</tool_call>"],
    "kimi_k2": [
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "pythonic": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "qwen3_coder": ["<tool_call>", "</tool_call>"],
}
# What texts are made of beside single bytes: parts of marks, and words that parsers read as values.
_WORDS = (
    *("</", "<", ">", "tool_call>", "</tool_call", "</parameter>", "</function", "parameter=x>"),
    *("null", "None", "true", "NaN", '"', "\\", '\\"', "\n\n", "  ", "12", "]]>", "<![CDATA["),
    *(
        "</arg_value>",
        "<|",
        "|>",
        "escape>",
        "<function name=",
        'name="',
        "},",
        "[ARGS]",
        "é",
        "日本",
    ),
    *('="', '>"', ">\n", "l_call>{", "<tool_call>{", "x<tool_call>", "call>\n"),
)


@cache
def tokenizer_of(parser: str, *, plain: bool = False) -> TokenizerWrapper:
    """mlx-lm's tokenizer with one of its tool parsers.

    Args:
        parser: The name of a module of mlx-lm.
        plain: Whether all marks of the format are plain text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = ["".join(text for text, _ in level.pre_tokenize_str(word)) for word in _WORDS]
    names = dict.fromkeys(["<s>", "</s>", *alphabet, *words])
    vocabulary = {token: number for number, token in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    inner = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if not plain:
        inner.add_tokens(TOKENS.get(parser, []), special_tokens=True)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return TokenizerWrapper(
        inner,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )


def tool(name: str, parameters: dict | None = None) -> dict:
    """A tool in OpenAI's form."""
    if parameters is None:
        parameters = {}
    function = {"name": name, "description": "what it does", "parameters": parameters}
    return {"type": "function", "function": function}


def of(required=(), /, **properties) -> dict:
    """The schema of an object with these properties."""
    return {"type": "object", "properties": properties, "required": list(required)}


POINT = of(["x"], x={"type": "number"}, y={"type": "number", "minimum": -1.5, "maximum": 20})
# Those that each format can carry.
SIMPLE = [
    tool("ping"),
    tool(
        "get_weather",
        of(
            ["city"],
            city={"type": "string"},
            days={"type": "integer", "minimum": 1, "maximum": 14},
            unit={"type": "string", "enum": ["celsius", "fahrenheit", "null", " k "]},
            exact={"type": "boolean"},
        ),
    ),
    tool(
        "note",
        of(
            ["text", "code"],
            text={"type": "string", "minLength": 2, "maxLength": 12},
            code={"type": "string", "pattern": '^[A-Z]{2}-\\d+("|\\\\)?[^a]$'},
            share={"type": "number", "exclusiveMinimum": 0, "maximum": 0.75},
            level={"enum": [1, 2.5, "high", None, True]},
            on={"type": "string", "format": "date"},
        ),
    ),
    tool(
        "maybe",
        of(
            name={"anyOf": [{"type": "string"}, {"type": "null"}]},
            size={"type": ["integer", "null"]},
            either={"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 9}]},
            step={"type": "integer", "multipleOf": 5},
        ),
    ),
]
# Those with lists and objects.
NESTED = [
    *SIMPLE,
    tool(
        "draw",
        of(
            ["points"],
            points={"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1},
            tags={"type": "array", "items": {"enum": ["a", "b", 3]}, "uniqueItems": False},
            style={"type": "object", "additionalProperties": {"type": "string"}},
            anything={},
            shape={"$ref": "#/$defs/shape"},
        )
        | {
            "$defs": {
                "point": POINT,
                "shape": {
                    "oneOf": [
                        of(["kind", "r"], kind={"const": "circle"}, r={"type": "number"}),
                        of(
                            ["kind", "parts"],
                            kind={"const": "group"},
                            parts={"type": "array", "items": {"$ref": "#/$defs/shape"}},
                        ),
                    ]
                },
            }
        },
    ),
]
# One that formats with the arguments as one object of JSON can carry.
MERGED = tool(
    "merge", {"allOf": [of(["a"], a={"type": "string"}), of(["b"], b={"type": "integer"})]}
)
