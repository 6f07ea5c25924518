"""Patterns of a JSON schema as regular expressions of texts as they are written.

What comes out is in the syntax of Rust's `regex`, which llguidance reads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_SHORTHANDS: dict[str, Callable[[str], bool]] = {
    "d": lambda character: character in "0123456789",
    "w": lambda character: character.isascii() and (character.isalnum() or character == "_"),
    "s": str.isspace,
}
# In a class that is not negated, fewer characters than Unicode's; otherwise more. So what is
# written is matched both by JavaScript's reading of a pattern and by Python's.
_ASCII = {"d": "0-9", "w": "A-Za-z0-9_", "s": r"\t\n\x0b\x0c\r "}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_LOOKAROUND = ("(?=", "(?!", "(?<=", "(?<!")


@dataclass
class CharacterSet:
    r"""A class of characters, such as ``[^a-z\d]``."""

    negated: bool = False
    ranges: list[tuple[str, str]] = field(default_factory=list)
    shorthands: list[str] = field(default_factory=list)  # such as "d", "W"

    def __contains__(self, character: str) -> bool:
        listed = any(low <= character <= high for low, high in self.ranges)
        for name in self.shorthands:
            listed |= _SHORTHANDS[name.lower()](character) != name.isupper()
        return listed != self.negated

    def body(self) -> str:
        """The class between its brackets, in Rust's syntax."""
        parts = [f"{_escaped(low)}-{_escaped(high)}" for low, high in self.ranges]
        for name in self.shorthands:
            is_wide = name.isupper() or self.negated
            parts.append(rf"\{name}" if is_wide else _ASCII[name])
        return ("^" if self.negated else "") + "".join(parts)


ANY_CHARACTER = CharacterSet(negated=True, ranges=[("\0", "\0")])
_ANY_BUT_NEWLINE = CharacterSet(negated=True, ranges=[("\n", "\n"), ("\r", "\r")])


def _escaped(character: str) -> str:
    return rf"\x{{{ord(character):x}}}"


def written_pattern(pattern: str, written: Callable[[CharacterSet], str]) -> str:
    """The texts that match a JSON schema's ``pattern`` anywhere, as they are written.

    Args:
        pattern: A regular expression as JavaScript and Python read it.
        written: The regular expression of a written character out of a set.

    Raises:
        ValueError: If the pattern is wrong, or has a part that is not followed.
    """
    try:
        re.compile(pattern.replace("(?<", "(?P<"))
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r:.60} is wrong ({error})") from None
    return _Pattern(pattern, written).translated()


class _Pattern:
    """A pattern on its way from the left to the right."""

    def __init__(self, pattern: str, written: Callable[[CharacterSet], str]):
        self._pattern = pattern
        self._written = written
        self._at = 0
        self._depth = 0

    def translated(self) -> str:
        anything = self._written(ANY_CHARACTER) + "*"
        branches: list[str] = []
        branch: list[str] = []
        begins = False  # whether the branch is anchored there
        ends = False
        while self._at < len(self._pattern):
            symbol = self._pattern[self._at]
            if symbol == "^" and not branch:
                begins = True
                self._at += 1
            elif symbol == "$" and self._depth == 0 and self._is_at_end_of_branch():
                ends = True
                self._at += 1
            elif symbol == "|" and self._depth == 0:
                branches.append(_anchored(branch, anything, begins, ends))
                branch = []
                begins = False
                ends = False
                self._at += 1
            else:
                branch.append(self._next())
        branches.append(_anchored(branch, anything, begins, ends))
        return "(" + "|".join(branches) + ")"

    def _is_at_end_of_branch(self) -> bool:
        return self._pattern[self._at + 1 : self._at + 2] in ("", "|")

    def _refuse(self, part: str) -> ValueError:
        return ValueError(f"the pattern {self._pattern!r:.60} has {part}, which is not followed")

    def _next(self) -> str:
        """The translation of the next part."""
        symbol = self._pattern[self._at]
        if symbol == "(":
            return self._group()
        if symbol == "[":
            return self._written(self._class())
        if symbol == "\\":
            return self._written(self._escape())
        if symbol in "*+?" or (symbol == "{" and self._counter()):
            return self._quantifier()
        self._at += 1
        if symbol == ")":
            self._depth -= 1
            return ")"
        if symbol == "|":
            return "|"
        if symbol in "^$":
            raise self._refuse("an anchor in its midst")
        if symbol == ".":
            return self._written(_ANY_BUT_NEWLINE)
        return self._written(CharacterSet(ranges=[(symbol, symbol)]))

    def _group(self) -> str:
        rest = self._pattern[self._at :]
        if rest.startswith(_LOOKAROUND):
            raise self._refuse("look-around")
        opening = re.match(r"\((\?:|\?P?<\w+>)?", rest)
        assert opening is not None
        if opening[1] is None and rest.startswith("(?"):
            raise self._refuse("a flag")
        self._at += opening.end()
        self._depth += 1
        return "("

    def _counter(self) -> re.Match | None:
        return re.compile(r"\{\d+(,\d*)?\}").match(self._pattern, self._at)

    def _quantifier(self) -> str:
        counter = self._counter()
        text = counter[0] if counter else self._pattern[self._at]
        self._at += len(text)
        following = self._pattern[self._at : self._at + 1]
        if following == "+":
            raise self._refuse("a possessive quantifier")
        if following == "?":  # as few as possible: of whole texts that is the same
            self._at += 1
        return text

    def _class(self) -> CharacterSet:
        self._at += 1
        found = CharacterSet()
        if self._pattern[self._at] == "^":
            found.negated = True
            self._at += 1
        is_first = True
        while self._pattern[self._at] != "]" or is_first:
            is_first = False
            low = self._class_item()
            if low.shorthands:
                found.shorthands += low.shorthands
                continue
            begin = low.ranges[0][0]
            end = begin
            if self._pattern[self._at] == "-" and self._pattern[self._at + 1] != "]":
                self._at += 1
                end = self._class_item().ranges[0][1]
            found.ranges.append((begin, end))
        self._at += 1
        return found

    def _class_item(self) -> CharacterSet:
        symbol = self._pattern[self._at]
        if symbol == "\\":
            if self._pattern[self._at + 1] == "b":
                self._at += 2
                return CharacterSet(ranges=[("\b", "\b")])
            return self._escape()
        self._at += 1
        return CharacterSet(ranges=[(symbol, symbol)])

    def _escape(self) -> CharacterSet:
        name = self._pattern[self._at + 1 : self._at + 2]
        code = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})").match(self._pattern, self._at)
        if code:
            self._at += len(code[0])
            character = chr(int(code[1][1:], 16))
        elif name.lower() in _SHORTHANDS:
            self._at += 2
            return CharacterSet(shorthands=[name])
        elif name in _CONTROLS:
            self._at += 2
            character = _CONTROLS[name]
        elif name.isalnum():
            raise self._refuse(rf"\{name}")
        else:
            self._at += 2
            character = name
        return CharacterSet(ranges=[(character, character)])


def _anchored(branch: list[str], anything: str, begins: bool, ends: bool) -> str:
    before = "" if begins else anything
    after = "" if ends else anything
    return before + "".join(branch) + after


@lru_cache(64)
def without(marks: tuple[str, ...], other_than: Callable[[str], str]) -> str:
    """Texts in which none of some marks occurs.

    One expression without a complement, which would make masks slow.

    Args:
        marks: Texts. Where one is longer than a character, its first one is in no other place of
            any of them.
        other_than: The regular expression of a character that is none of these.
    """
    least = [mark for mark in marks if not any(other in mark for other in marks if other != mark)]
    single = "".join(mark for mark in least if len(mark) == 1)
    longer = [mark for mark in least if len(mark) > 1]
    starts = "".join(dict.fromkeys(mark[0] for mark in longer))
    others = other_than(single + starts)
    if not longer:
        return f"({others})*"
    tree = _tree_of(longer)
    begun = "|".join(f"{quoted_regex(start)}{_begun(tree[start])}" for start in starts)
    left = "|".join(
        f"{quoted_regex(start)}{_left(tree[start], single + starts, other_than)}"
        for start in starts
    )
    return f"({others}|({begun})*({left}))*({begun})*"


def _tree_of(marks: list[str]) -> dict[str, Any]:
    """The marks as a tree of characters, in which each ends with an empty branch."""
    tree: dict[str, Any] = {}
    for mark in marks:
        branch = tree
        for character in mark:
            branch = branch.setdefault(character, {})
    return tree


def _begun(branch: dict[str, Any]) -> str:
    """What may follow the beginning of a mark, up to before its last character."""
    further = [
        f"{quoted_regex(character)}{_begun(rest)}" for character, rest in branch.items() if rest
    ]
    return f"({'|'.join(further)})?" if further else ""


def _left(branch: dict[str, Any], excluded: str, other_than: Callable[[str], str]) -> str:
    """What follows the beginning of a mark up to a character that is not the mark's."""
    further = [other_than(excluded + "".join(branch))]
    for character, rest in branch.items():
        if rest:
            further.append(f"{quoted_regex(character)}{_left(rest, excluded, other_than)}")
    return f"({'|'.join(further)})"


def quoted_regex(text: str) -> str:
    """A regular expression of exactly this text."""
    return "".join(
        letter if letter.isascii() and letter.isalnum() else _escaped(letter) for letter in text
    )


def containing(text: str) -> str:
    """A regular expression of texts in which ``text`` occurs."""
    return f"(?s:.*){quoted_regex(text)}(?s:.*)"
