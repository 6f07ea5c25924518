"""Compiles grammars with llguidance: the work of a helper process (common/guarded.py)."""

from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

TOKENS = LLTokenizer("byte")


def work(request: dict[str, Any]) -> list[Any] | None:
    """Compiles each grammar, and computes what its first token may be.

    Args:
        request: "grammars", each as JSON; the "limits" of llguidance; and how many bytes a grammar
            may force at once, "forced".

    Returns:
        The number of the first grammar to which there is an objection, and the objection; or None.
    """
    limits = LLParserLimits(**request["limits"])
    for number, grammar in enumerate(request["grammars"]):
        matcher = LLMatcher(TOKENS, grammar, log_level=0, limits=limits)
        # Parts of it are compiled when the first token's mask needs them.
        matcher.compute_bitmask()
        if matcher.is_error():
            return [number, matcher.get_error()]
        if len(matcher.compute_ff_bytes()) > request["forced"]:
            return [number, f"it leaves no choice for more than {request['forced']:,} bytes"]
    return None
