"""JSON without what JSON does not have."""

import json
import math

import pytest

from mlx_flashhead.serving.valid_json import VERY_UNLIKELY, dumps


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [1, 1.5, "NaN", None, True, [], {"a": [0.1, {"b": -2.0}]}])
def test_what_json_has_stays(value):
    assert strict(dumps(value)) == value


def test_infinite_logprobs_become_the_number_of_openais_api():
    content = [{"token": "a", "logprob": -math.inf, "top_logprobs": ({"logprob": -0.5},)}]
    found = strict(dumps({"content": content}))["content"]
    expected = {"token": "a", "logprob": VERY_UNLIKELY, "top_logprobs": [{"logprob": -0.5}]}
    assert found == [expected]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_other_numbers_that_json_lacks_become_null(value):
    assert strict(dumps({"limit": value, "list": [value, 1.0]})) == {
        "limit": None,
        "list": [None, 1.0],
    }


def test_errors_have_the_form_of_openais_api():
    assert strict(dumps({"error": "too long"}))["error"]["message"] == "too long"
    assert strict(dumps({"error": {"message": "as it is"}})) == {"error": {"message": "as it is"}}


def test_options_are_those_of_json():
    assert dumps({"a": "ä"}, ensure_ascii=False, indent=1) == '{\n "a": "ä"\n}'
