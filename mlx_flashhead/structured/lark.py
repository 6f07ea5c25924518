"""Lark grammars in llguidance's dialect, as they are put together."""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from .vocabulary import llguidance

# Characters of one grammar: a schema is repeated for each argument that refers into it.
MAX_CHARACTERS = 4_000_000
# What templates may name: spaces and lines, a line, a number, and the end of a call with an id.
_COMMON = {
    "_": "PADDING?",
    "line": '"\\n"?',
    "number": "NUMBER",
    "id": '("," PADDING? "\\"id\\":" PADDING? IDENTIFIER)?',
}
_TERMINALS = r"""
PADDING: /( \n?|\n\n?[ ]{0,24})/
NUMBER: /[0-9]{1,3}/
IDENTIFIER: /"[A-Za-z0-9]{9}"/
"""


class LarkRules:
    """Rules and terminals under names of their own. The same body gets the same name.

    Args:
        special: Token ids by text, of the tokens that no plain text becomes.
    """

    def __init__(self, special: Mapping[str, int]):
        self.special = special
        names = sorted(special, key=len, reverse=True)
        # Without any it matches nowhere.
        any_name = "|".join(map(re.escape, names)) or "(?!)"
        self._parts = re.compile(f"({any_name})")
        # Names of rules, by their bodies or keys.
        self._names: dict[Hashable, str] = {}
        self._bodies: dict[str, str] = {}
        self._n_characters = 0

    def text(self, start: str) -> str:
        """The whole grammar, of texts that the expression ``start`` derives."""
        lines = [f"start: {start}\n"]
        for name, body in self._bodies.items():
            lines.append(f"{name}: {body}\n")
        return "".join([*lines, _TERMINALS])

    def rule(self, body: str, prefix: str = "r", attributes: str = "") -> str:
        """The name of a rule with this body.

        Args:
            body: A Lark expression.
            prefix: Of its name, "T" for a terminal.
            attributes: Such as "[lazy]": it ends as soon as it matches.

        Raises:
            ValueError: If the grammar has become too long.
        """
        if body not in self._names:
            self._names[body] = f"{prefix}{len(self._bodies)}"
            self._define(self._names[body] + attributes, body)
        return self._names[body]

    def recursive(self, key: Hashable, make: Callable[[], str]) -> str:
        """The name of a rule whose body may refer to the rule; empty if its body is.

        Args:
            key: Under which the rule is known.
            make: Makes the body.
        """
        if key in self._names:
            return self._names[key]
        name = f"v{len(self._names)}"
        self._names[key] = name
        body = make()
        self._define(name, body or literal_of(""))
        if not body:
            self._names[key] = ""
        return self._names[key]

    def json(self, schema: dict[str, Any]) -> str:
        """The name of a rule of JSON that follows a schema."""
        return self.rule(f"%json {json.dumps(schema)}")

    def _define(self, name: str, body: str) -> None:
        self._bodies[name] = body
        self._n_characters += len(body)
        if self._n_characters > MAX_CHARACTERS:
            raise ValueError(f"its grammar has more than {MAX_CHARACTERS:,} characters")

    def expression(self, text: str) -> str:
        """A Lark expression of exactly this text, its special tokens as such."""
        written = []
        for part in self.parts(text):
            if part in self.special:
                written.append(f"<[{self.special[part]}]>")
            else:
                written.append(literal_of(part))
        return " ".join(written)

    def parts(self, text: str) -> list[str]:
        """The special tokens of a text, and the texts between them."""
        return [part for part in self._parts.split(text) if part]

    def template(
        self, text: str, words: Mapping[str, str] | None = None, **expressions: str
    ) -> str:
        """A Lark expression of a text with places, such as ``$name``.

        Args:
            text: The text. ``$_`` stands for spaces that may be there.
            words: What stands in a place as it is.
            expressions: Lark expressions of what stands in a place.
        """
        known = {name: self.expression(word) for name, word in (words or {}).items()}
        known = {**_COMMON, **known, **expressions}
        # Texts and names in turns, a text first.
        pieces = re.split(r"\$(\w+)", text)
        found = [self.expression(pieces[0])]
        for name, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            found += [known[name], self.expression(piece)]
        return " ".join(filter(None, found))

    def text_until(self, mark: str, *matching: str, never: Sequence[str] = ()) -> str:
        """A Lark expression of a text that ends at the first ``mark``, and the mark.

        Args:
            mark: What follows the text, and does not occur in it.
            matching: Terminals that the text matches, all of them.
            never: Further texts that do not occur in it.
        """
        without = f"~/(?s:.*){any_of([mark, *never])}(?s:.*)/"
        text = self.rule(" & ".join([*matching, without]), "T")
        first = self.parts(mark)[0]
        if first in self.special:
            return f"{text} {self.expression(mark)}"
        # It is one terminal, since the longest one counts: a text by itself would take the mark's
        # letters.
        whole = self.rule(f"{text} {literal_of(first)}", "T")
        return f"{whole} {self.expression(mark.removeprefix(first))}"

    def in_order(
        self, members: Sequence[tuple[str, bool]], comma: str = "", *, needs_one: bool = False
    ) -> str:
        """A Lark expression of members in their order, without some of those not required.

        Args:
            members: Lark expressions, each with whether it is required.
            comma: A Lark expression of what stands between two of them.
            needs_one: Whether there must be one.
        """
        # What may come first, from the last to the first.
        firsts: list[str] = []
        following = ""
        for member, required in reversed(members):
            rest = ""
            if following:
                rest = self.rule(following)
            if required:
                firsts = []
                following = f"{comma} {member} {rest}"
            else:
                following = f"({comma} {member})? {rest}"
            firsts.append(f"{member} {rest}")
        inside = one_of(reversed(firsts))
        if not inside or needs_one or any(required for _, required in members):
            return inside
        return f"({inside})?"


def literal_of(text: str) -> str:
    """A Lark expression of exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def quoted(text: str) -> str:
    """A regular expression of exactly this text."""
    characters = []
    for character in text:
        if character.isalnum():
            characters.append(character)
        else:
            characters.append(rf"\x{{{ord(character):x}}}")
    return "".join(characters)


def any_of(texts: Iterable[str]) -> str:
    """A regular expression of exactly these texts."""
    alternatives = "|".join(map(quoted, texts))
    return f"({alternatives})"


def matching(pattern: str) -> str:
    """A terminal of texts in which a JSON schema's pattern is found, not all of them.

    Anchors at its ends are taken off, and the rest matches the whole text up to them. So a branch
    with an anchor of its own matches less.
    """
    begin = "(?s:.*)"
    end = "(?s:.*)"
    if pattern.startswith("^"):
        begin = ""
        pattern = pattern.removeprefix("^")
    inner = re.sub(r"(?<!\\)((\\\\)*)\$$", r"\1", pattern)
    if inner != pattern:
        end = ""
    middle = llguidance().regex_to_lark(inner, "dw")
    return f"/{begin}(?:{middle}){end}/"


def one_of(expressions: Iterable[str]) -> str:
    """A Lark expression of one of several; empty if there are none."""
    distinct = list(dict.fromkeys(expressions))
    if not distinct:
        return ""
    if len(distinct) == 1:
        return distinct[0]
    return f"({' | '.join(distinct)})"
