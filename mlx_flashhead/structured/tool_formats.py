"""The formats in which models write calls of tools: one for each of mlx-lm's tool parsers."""

from dataclasses import replace
from keyword import kwlist
from typing import Any

from .call_format import CallFormat, Gemma, ListedFormat, Mistral

_JSON_NAMES = r"[^\x00-\x1f\x7f<\[]+"
_NAMES = r"[^\s\"'<>]+"
_PYTHON_NAME = rf"(?!({'|'.join(kwlist)})\b)[A-Za-z_]\w*"


_GLM = ListedFormat(
    plain=True,
    start="<tool_call>",
    end="</tool_call>",
    call="$name$_$arguments",
    section="$calls$_",
    names=r"[^\s<>{}\[\]\"'=]+",
    opening="<arg_key>$key</arg_key>$_<arg_value>",
    closing="</arg_value>",
    between="$_",
    never=("</tool_call>",),
)
_MINIMAX = ListedFormat(
    plain=True,
    start="<minimax:tool_call>",
    end="</minimax:tool_call>",
    call='<invoke name="$name">$_$arguments$_</invoke>$_',
    section="$_$calls",
    names=_NAMES,
    several=True,
    opening='<parameter name="$key">',
    closing="</parameter>",
    between="$_",
    keys=_NAMES,
    never=("</invoke>", "</minimax:tool_call>"),
    null_is_none=True,
)
CALL_FORMATS: dict[str, CallFormat] = {
    "function_gemma": Gemma(
        start="<start_function_call>",
        end="<end_function_call>",
        names=r"\w+",
        quote="<escape>",
        keys=r"[^:{}<,]+",
        has_parts=False,
        never=("}", "<end_function_call>"),
    ),
    "gemma4": Gemma(
        start="<|tool_call>",
        end="<tool_call|>",
        names=r"[\w-]+",
        free_keys="[A-Za-z_][A-Za-z0-9_]*",
        quote='<|"|>',
        never=("<tool_call|>",),
    ),
    "glm47": _GLM,
    "json_tools": CallFormat(
        start="<tool_call>",
        end="</tool_call>",
        call='{$_"name":$_$json_name,$_"arguments":$_$arguments$_}',
        section="$_$calls$_",
        names=_JSON_NAMES,
    ),
    "kimi_k2": CallFormat(
        start="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        call="<|tool_call_begin|>functions.$name:$number<|tool_call_argument_begin|>$arguments"
        "<|tool_call_end|>",
        several=True,
    ),
    "kimi_k3": ListedFormat(
        plain=True,
        start="<|open|>tools<|sep|>",
        end="<|close|>tools<|sep|>",
        call='<|open|>call tool="$name" index="$number"<|sep|>$arguments<|close|>call<|sep|>',
        names=r"[^\s\"<>&|]+",
        several=True,
        opening='<|open|>argument key="$key" type="$type"<|sep|>',
        closing="<|close|>argument<|sep|>",
        keys=r"[^\s\"<>&|]+",
        never=("<|open|>", "<|close|>", "<|sep|>"),
        trims=False,
    ),
    "laguna": _GLM,
    "longcat": replace(
        _GLM,
        start="<longcat_tool_call>",
        end="</longcat_tool_call>",
        opening="<longcat_arg_key>$key</longcat_arg_key>$_<longcat_arg_value>",
        closing="</longcat_arg_value>",
        empty='{"name": $json_name, "arguments": {}}',
        never=("</longcat_tool_call>",),
    ),
    "minicpm5": ListedFormat(
        plain=True,
        start="<function name=",
        end="</function>",
        call='"$name">$_$arguments',
        section="$calls$_",
        names=_NAMES,
        opening='<param name="$key">',
        closing="</param>",
        between="$_",
        keys=_NAMES,
        never=("</function>", "<![CDATA["),
        null_is_none=True,
    ),
    "minimax_m2": _MINIMAX,
    "mistral": Mistral(
        start="[TOOL_CALLS]",
        end="",
        call='{$_"name":$_$json_name,$_"arguments":$_$arguments$id$_}',
        section="$_[$_$calls$_]",
        names=_JSON_NAMES,
        several=True,
        comma=",$_",
    ),
    # Its parser reads JSON also where a string is meant.
    "muse_spark": ListedFormat(
        start="<atem:function_calls>",
        end="</atem:function_calls>",
        call='<atem:invoke name="$name">$_$arguments$_</atem:invoke>$_',
        section="$_$calls",
        names=_NAMES,
        several=True,
        opening='<atem:parameter name="$key">',
        closing="</atem:parameter>",
        between="$_",
        keys=_NAMES,
    ),
    "pythonic": ListedFormat(
        start="<|tool_call_start|>",
        end="<|tool_call_end|>",
        call="$name($arguments)",
        section="[$calls]",
        names=rf"{_PYTHON_NAME}(\.{_PYTHON_NAME})*",
        several=True,
        comma=",$_",
        between=",$_",
        keys=_PYTHON_NAME,
    ),
    "qwen3_coder": ListedFormat(
        plain=True,
        start="<tool_call>",
        end="</tool_call>",
        call="<function=$name>\n$arguments$line</function>",
        section="$line$calls$line",
        names=r"[^\s<>]+",
        opening="<parameter=$key>\n",
        closing="\n</parameter>",
        between="\n",
        keys=r"[^\s<>]+",
        never=("</parameter>", "</function>", "</tool_call>"),
        trims=False,
        null_is_none=True,
    ),
}


def format_name_of(tokenizer: Any) -> str:
    """The name of the format of a tokenizer's calls: that of mlx-lm's parser for it.

    Raises:
        ValueError: If it has none, or one that is not known here.
    """
    parser = getattr(tokenizer, "tool_parser", None)
    name = getattr(parser, "__module__", "").rpartition(".")[2]
    if name not in CALL_FORMATS:
        raise ValueError("The format of this model's calls is not known here.")
    return name
