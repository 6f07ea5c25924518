"""Calls that end with a sentence."""

import pytest


def refused(call, *expected):
    """The call raises one sentence with each of the patterns."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for pattern in expected:
        error.match(pattern)
