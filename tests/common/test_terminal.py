"""Lines broken between words, while the text still comes, keys meanwhile, and tables."""

import os
import pty
import random
import sys
import termios

import pytest

from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.common.terminal import WordWrap, bar_of, stop_key

TEXT = """The bridge over the river was old, and nobody knew who had built it.

    def bridge(): return "old"   # four spaces before, three between
- a-very-long-word-that-fits-no-line-of-twenty-columns, then short ones
"""


def wrapped(text, columns, seed=None):
    """What is shown of a text that comes at once, or with a seed in random pieces."""
    wrap = WordWrap(lambda: columns)
    rng = random.Random(seed)
    shown = ""
    while text:
        size = len(text) if seed is None else rng.randint(1, 5)
        shown += wrap.feed(text[:size])
        text = text[size:]
    return shown + wrap.end()


@pytest.mark.parametrize(
    "text, columns, expected",
    [
        ("one two three four", 10, "one two\nthree\nfour"),
        # The last column stays empty.
        ("one two three", 13, "one two\nthree"),
        ("see " + "x" * 25 + " now", 10, "see\n" + "x" * 25 + " now"),
        # They take two columns each, and have no spaces between them.
        ("一二三四五六", 9, "一二三四\n五六"),
        # An accent takes no column.
        ("e\u0301" * 3 + " e", 6, "e\u0301" * 3 + " e"),
    ],
)
def test_lines_end_between_words(text, columns, expected):
    assert wrapped(text, columns) == expected


@pytest.mark.parametrize("columns", [9, 20, 40, 200])
def test_no_word_changes_and_no_line_is_too_long(columns):
    shown = wrapped(TEXT, columns)
    assert shown.split() == TEXT.split()
    for line in shown.splitlines():
        is_long_word = " " not in line.strip()
        # Others may stand after a word of several lines.
        ends_long_word = not is_long_word and len(line.split()[0]) >= columns
        assert len(line) < columns or is_long_word or ends_long_word
    assert wrapped(TEXT, 10_000) == TEXT
    # The same is shown however the text is cut into pieces.
    for seed in range(5):
        assert wrapped(TEXT, columns, seed) == shown


def test_no_figure_of_a_table_is_cut_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    headings = [f"heading {i}" for i in range(9)]
    figures = [f"{i}234.5678" for i in range(9)]
    table = new_table("A title. " * 20, headings, "A caption. " * 20)
    table.add_row(*figures)
    show("Some text. " * 20, table)
    text, _, screen = capsys.readouterr().out.partition("A title.")
    assert all(word in screen for word in headings + figures)
    assert max(map(len, text.splitlines())) <= 60


def test_no_path_is_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    path = f"/home/ann/{'folder/' * 12}heads"
    table = new_table(f"Kept in {path} since then", ["id"])
    table.add_row("a")
    show(table, f"Kept in {path} since then")
    assert capsys.readouterr().out.count(path) == 2


def test_what_is_typed_during_an_answer_outlives_ctrl_c():
    main, other = pty.openpty()
    with open(other) as stdin, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        with stop_key():
            assert termios.tcgetattr(other)[3] & termios.NOFLSH
        assert not termios.tcgetattr(other)[3] & termios.NOFLSH
    os.close(main)


def test_a_bar_has_its_width():
    assert [bar_of(share, 4) for share in (0, 0.5, 1)] == ["░░░░", "██░░", "████"]
