"""``generate --json-schema | --regex | --grammar``: the text, a text that is cut, wrong forms."""

import json
import re
import sys

import pytest

SCHEMA = """{
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "on": {"type": "boolean"}},
    "required": ["name", "on"],
    "additionalProperties": false
}"""


@pytest.fixture
def generate(run, converted):
    def generate(*arguments, max_tokens=80):
        return run(
            "generate", "--model", converted, "--prompt", "One day", "--verbose", "F",
            "--max-tokens", max_tokens, *arguments,
        )  # fmt: skip

    return generate


@pytest.fixture
def form(tmp_path):
    """A function that writes a form into a file."""

    def form(content):
        (tmp_path / "form").write_text(content)
        return tmp_path / "form"

    return form


@pytest.mark.parametrize("further", [(), ("--dense",), ("--temp", 1, "--seed", 2)])
def test_json_schema(generate, form, further):
    code, output, errors = generate("--json-schema", form(SCHEMA), *further)
    assert (code, errors) == (0, "")
    answer = json.loads(output)
    assert list(answer) == ["name", "on"] and isinstance(answer["on"], bool)
    code, output, errors = generate("--json-schema", form(SCHEMA), *further, max_tokens=3)
    assert code == 0 and len(output) < 8
    assert "not a whole one of the JSON schema: it was cut at --max-tokens 3" in errors


def test_regular_expression_and_grammar(generate, form):
    code, output, _ = generate("--regex", "[0-9]{4}(ab)+c")
    assert code == 0 and re.fullmatch("[0-9]{4}(ab)+c\n", output)
    code, output, _ = generate("--grammar", form('start: "yes" | "no"\n'))
    assert code == 0 and output in ("yes\n", "no\n")


def test_an_answer_does_not_act_on_a_terminal(generate, monkeypatch):
    pattern = "a\\x1b\\[2Jb"
    assert generate("--regex", pattern)[1] == "a\x1b[2Jb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate("--regex", pattern)[1] == "a[2Jb\n"
