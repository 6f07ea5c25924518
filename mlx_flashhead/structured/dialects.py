"""How the formats of tool calls write JSON's values: as JSON, as Python, in Gemma's way, bare."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .lark import LarkRules, literal, one_of
from .regexes import CharacterSet, quoted_regex, without

_ESCAPES = {
    '"': r"\"",
    "\\": r"\\",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\b": r"\b",
    "\f": r"\f",
}
_PLAIN = r'[^"\\\x00-\x1f\x7f]'  # what a string of JSON holds as it is
# An escape by number, but for the character 0 and halves of characters.
_BY_NUMBER = r"\\u(00[0-9a-fA-F][1-9a-fA-F]|00[1-9a-fA-F]0|0[1-9a-fA-F][0-9a-fA-F]{2}"
_BY_NUMBER += r"|[1-9a-cA-CeEfF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})"


@dataclass(frozen=True)
class Dialect:
    """A way to write values.

    Attributes:
        forbidden: Texts that no string may hold, since the reader takes them for its marks.
        key: What an object's key looks like: its name becomes a text, or None if it has none.
        separators: Regular expressions after an opening bracket, between two members, and before
            a closing bracket; the one between a key and its value.
    """

    forbidden: tuple[str, ...] = ()
    quote: str = '"'
    words: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (None, ("null",)),
        (True, ("true",)),
        (False, ("false",)),
    )
    comma: str = r",( |\n[ ]{0,24})?"
    colon: str = ":[ ]?"
    after_opening: str = r"( |\n[ ]{0,24})?"
    before_closing: str = r"( |\n[ ]{0,24})?"
    free_key: str = ""  # a regular expression of an unlisted key; empty: any string
    has_escapes: bool = True  # whether strings hold some characters as JSON's escapes
    has_slash_escape: bool = True
    has_lists: bool = True  # of more than one element
    has_objects: bool = True
    in_lists: "Dialect | None" = None  # how elements are written, if it is another way

    def character(self, allowed: CharacterSet) -> str:
        """A regular expression of a written character out of a set."""
        if not self.has_escapes:
            return f"[{allowed.body()}]"
        branches = [f"[[{allowed.body()}]&&{_PLAIN}]"]
        branches += [re.escape(text) for letter, text in _ESCAPES.items() if letter in allowed]
        return f"({'|'.join(branches)})"

    def other_than(self, excluded: str) -> str:
        """A regular expression of a written character that is none of these."""
        known = "".join(rf"\x{{{ord(letter):x}}}" for letter in excluded)
        if not self.has_escapes:
            return rf"[^\x00{known}]"
        slash = "/" if self.has_slash_escape else ""
        return rf'[^"\\\x00-\x1f\x7f{known}]|\\["\\bfnrt{slash}]|{_BY_NUMBER}'

    def string(
        self,
        rules: LarkRules,
        marks: "FormatMarks",
        inside: Sequence[str],
        never: Sequence[str] = (),
    ) -> str:
        """Strings whose inside matches all of ``inside`` and none of ``never``."""
        if not self.has_escapes:
            end = marks.text_until(rules, self.quote, inside, never, forbidden=self.forbidden)
            return f"{marks.expression(self.quote)} {end}"
        matching = [without(self.forbidden, self.other_than), *inside]
        return rules.terminal(
            [f'"({regex})"' for regex in matching], [f'"({regex})"' for regex in never]
        )

    def key(self, name: str) -> str | None:
        """A listed key as it is written."""
        if self.free_key and re.fullmatch(self.free_key, name, re.ASCII):
            return name
        text = json.dumps(name, ensure_ascii=False)
        if self.free_key and re.search(r"[{}<,:]", text):
            return None
        return text if self.allows(text) else None

    def allows(self, text: str) -> bool:
        """Whether the text holds no mark of the reader, and no character that may not be there."""
        return "\0" not in text and not any(mark in text for mark in self.forbidden)

    def written(self, value: Any) -> str | None:
        """A value of an enumeration; None if it cannot be written."""
        if value is None or isinstance(value, bool):
            return next(texts[0] for known, texts in self.words if known is value)
        if isinstance(value, str) and not self.has_escapes:
            inside = value if self.allows(value) and self.quote not in value else None
            return None if inside is None else self.quote + inside + self.quote
        if isinstance(value, list | dict) and not (self.has_objects and self.has_lists):
            return None
        if isinstance(value, list):
            parts = [self.written(part) for part in value]
            return None if None in parts else f"[{','.join(map(str, parts))}]"
        if isinstance(value, dict):
            members = [(self.key(name), self.written(part)) for name, part in value.items()]
            if any(None in member for member in members):
                return None
            return "{" + ",".join(f"{name}:{part}" for name, part in members) + "}"
        text = json.dumps(value, ensure_ascii=False)
        return text if self.allows(text) else None

    def word(self, value: bool | None) -> str:
        """A Lark expression of true, false or null."""
        texts = next(texts for known, texts in self.words if known is value)
        return one_of(map(literal, texts))


class FormatMarks:
    """The marks of a format as a tokenizer has them: tokens of their own, or plain text.

    Args:
        special: Token ids by text, of the tokens that no plain text becomes.
    """

    def __init__(self, special: Mapping[str, int]):
        self._special = special
        names = sorted(special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"((?!))")

    def expression(self, text: str) -> str:
        """A Lark expression of this text, its special tokens as such."""
        return " ".join(self._part(part) for part in self._split.split(text) if part)

    def text_until(
        self,
        rules: LarkRules,
        mark: str,
        matching: Sequence[str] = (),
        never: Sequence[str] = (),
        *,
        forbidden: Sequence[str] = (),
    ) -> str:
        """A Lark expression of a text that ends at the first ``mark``, and the mark.

        Args:
            rules: Where its terminal goes.
            mark: What follows the text, and does not occur in it.
            matching: Regular expressions that the text matches, all of them.
            never: Those that it does not match.
            forbidden: Further texts that do not occur in it.
        """
        text = without((mark, *forbidden), BARE.other_than)
        first, *rest = [part for part in self._split.split(mark) if part]
        if first in self._special:
            return f"{rules.terminal([text, *matching], never)} {self.expression(mark)}"
        # one terminal, since the longest one counts: a text by itself would take the mark's letters
        end = quoted_regex(first)
        whole = rules.terminal(
            [f"({regex}){end}" for regex in (text, *matching)],
            [f"({regex}){end}" for regex in never],
        )
        return " ".join([whole, *map(self._part, rest)])

    def _part(self, part: str) -> str:
        return f"<[{self._special[part]}]>" if part in self._special else literal(part)


def json_dialect(*forbidden: str) -> Dialect:
    """Returns JSON's dialect, whose strings have none of the ``forbidden`` texts."""
    return Dialect(forbidden=forbidden)


def python_dialect(*forbidden: str) -> Dialect:
    """Literals of Python, in which mlx-lm's parser knows JSON's words as well."""
    words = (
        (None, ("None", "null")),
        (True, ("True", "true")),
        (False, ("False", "false")),
    )
    return Dialect(forbidden=forbidden, words=words, has_slash_escape=False)


def gemma_dialect(*forbidden: str) -> Dialect:
    """Gemma 4's: bare keys, and strings between marks instead of quotes, without escapes."""
    return Dialect(
        forbidden=forbidden,
        quote='<|"|>',
        comma=",",
        colon=":",
        after_opening="",
        before_closing="",
        free_key=r"[A-Za-z_][A-Za-z0-9_]*",
        has_escapes=False,
    )


def function_gemma_dialect(*forbidden: str) -> Dialect:
    """FunctionGemma's: its reader ends at the first brace, and a list at its first comma."""
    in_lists = Dialect(
        forbidden=(*forbidden, ",", "<escape>"),
        comma=",",
        after_opening="",
        before_closing="",
        has_lists=False,
        has_objects=False,
    )
    return Dialect(
        forbidden=forbidden,
        quote="<escape>",
        has_escapes=False,
        has_lists=False,
        has_objects=False,
        in_lists=in_lists,
        comma=",",
        colon=":",
        after_opening="",
        before_closing="",
    )


BARE = Dialect(quote="", has_escapes=False)  # a string as it is, which ends at a mark
