"""JSON without NaN and Infinity, in both directions."""

import math

import pytest

from mlx_flashhead.serving.api_error import dumps, loads


def test_what_is_written_can_be_read():
    """Numbers that are not finite become null, and halves of characters can be sent."""
    value = {"a": math.inf, "b": [math.nan, (-math.inf,)], "c": [1.5, "é", None, True]}
    written = {"a": None, "b": [None, [None]], "c": [1.5, "é", None, True]}
    assert loads(dumps(value).encode()) == written
    assert dumps("\ud800").encode() == b'"\\ud800"'
    assert loads(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    "text, said",
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"1e999", "too large"),
        (b"{", "Expecting"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b'{"a": ["\\ud800"]}', "half of a character"),
        (b'{"\\udE00": 1}', "half of a character"),
        (b'"\xed\xa0\x80"', "byte 1 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":[' * 51 + b"]}" * 51, "nested too deeply"),
        (b"1" * 5000, "4300 digits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_rest_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        loads(text)
