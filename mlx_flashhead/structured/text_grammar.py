"""What a whole text may be: free text with calls of tools, a form, and a thought before it."""

import json
from collections.abc import Sequence

from .grammar import Grammar, top_level
from .lark import LarkRules, any_of, one_of, quoted
from .tool_grammar import ToolCalls
from .vocabulary import Vocabulary


def text_grammar(
    vocabulary: Vocabulary,
    form: Grammar | None,
    calls: ToolCalls | None,
    *,
    required: bool = False,
    thought: tuple[str, str] | None = None,
) -> str:
    """Makes the grammars of a text for llguidance, as JSON.

    Without a form, and where no call is required, the text is free between its calls. Otherwise it
    is in the form, or has calls and nothing else. In a thought before that a call may come, too.

    Args:
        vocabulary: The tokens.
        form: What the whole text follows.
        calls: What calls look like.
        required: Whether the text must be a call.
        thought: The marks of a thought that may come first. It must come if the first mark is
            empty: the prompt has begun it.
    """
    sources = [each.source for each in (form, calls) if each is not None]
    if calls is None and thought is None:
        return top_level(*sources)
    rules = LarkRules(vocabulary.special)
    if calls is not None and form is None and not required:
        text = _free_text(vocabulary, rules, [calls.start])
        section = f"{_until(calls.start, text, rules)} @calls"
        start = f"({section})* {text}" if calls.goes_on else f"{section} | {text}"
    else:
        start = _text_in_form(vocabulary, rules, form, calls, thought)
    return top_level(json.dumps({"lark_grammar": rules.text(start)}), *sources)


def _text_in_form(
    vocabulary: Vocabulary,
    rules: LarkRules,
    form: Grammar | None,
    calls: ToolCalls | None,
    thought: tuple[str, str] | None,
) -> str:
    """A Lark expression of a form, or of calls and nothing else, perhaps after a thought."""
    bodies = [] if form is None else ["@form"]
    further = ""
    if calls is not None:
        section = f"PADDING? {rules.expression(calls.start)} @calls"
        further = f"({section})*" if calls.goes_on else ""
        bodies.append(f"{section} {further}")
    body = one_of(bodies)
    if thought is None:
        return body
    begin, end = thought
    opening = f"PADDING? {rules.expression(begin)}" if begin else ""
    free = _free_text(vocabulary, rules, [end] if calls is None else [end, calls.start])
    texts = [f"{opening} {_until(end, free, rules)} {body}"]
    if calls is not None:
        texts.append(f"{opening} {_until(calls.start, free, rules)} @calls {further}")
    return one_of([body, *texts] if begin else texts)


def _free_text(vocabulary: Vocabulary, rules: LarkRules, marks: Sequence[str]) -> str:
    """A Lark expression of free text without some marks, in whatever tokens they are written."""
    any_text = rules.rule("/(?s:.*)/", "T")
    rests: dict[int, list[str]] = {}  # of the marks that begin with a special token
    for mark in marks:
        first, *rest = rules.parts(mark)
        if first in rules.special:
            rests.setdefault(rules.special[first], []).append("".join(rest[:1]))
    marking = {*vocabulary.end_tokens, *rests}
    others = [token for token in vocabulary.other_than_text if token not in marking]
    parts = [f"<[{','.join(map(str, others))}]> {any_text}?"] if others else []
    for token, texts in rests.items():
        if all(texts):  # such a token may come, if the rest of the mark does not
            unlike = rules.rule(f"{any_text} & ~/{any_of(texts)}/", "T")
            parts.append(f"<[{token}]> {unlike}?")
    return f"{any_text}? ({one_of(parts)})*" if parts else f"{any_text}?"


def _until(mark: str, text: str, rules: LarkRules) -> str:
    """A Lark expression of a free text and a mark that ends it."""
    endings = [rules.rule(f"/(?s:.*){quoted(mark)}/", attributes="[lazy]")]
    if rules.parts(mark)[0] in rules.special:
        endings.append(rules.expression(mark))
    return f"{text} {one_of(endings)}"
