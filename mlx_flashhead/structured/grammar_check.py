"""Compiles a grammar with llguidance: the work of a helper process (common/guarded.py)."""

from llguidance import LLMatcher, LLTokenizer


def work(grammar: str) -> str:
    """Returns llguidance's objection to a compiled grammar; empty if there is none."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if not is_error:  # parts of it are compiled when the first token's mask needs them
        LLMatcher(LLTokenizer("byte"), grammar, log_level=0).compute_bitmask()
    return messages[0] if is_error else ""
