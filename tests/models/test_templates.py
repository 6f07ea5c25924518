"""Chat templates: what transformers makes of them, within limits of time and memory."""

import copy

import mlx_lm
import pytest

from mlx_flashhead.common.guarded import Guard
from mlx_flashhead.models import templates
from mlx_flashhead.models.templates import apply_template, template_variables
from model_folders import write_model

MESSAGES = [
    {"role": "user", "content": 'é "x" </s>', "name": None},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"a": 1.5}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A function: template → a tokenizer with it."""
    loaded = mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "llama")))[1]

    def tokenizer(template):
        made = copy.copy(loaded)
        made._tokenizer = copy.copy(loaded._tokenizer)
        made._tokenizer.chat_template = template
        return made

    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}x",
        "{{ messages | tojson(indent=2) }}{{ tools | tojson }}{{ documents is none }}",
        "{{ bos_token }}{{ eos_token }}{% if add_generation_prompt %}{{ mode }}{% endif %}{{ b }}",
        "{% set n = namespace(i=1) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% continue %}"
        "{% endfor %}{{ n.i }}{{ dict(a=2) }}{{ range(3) | list }}{{ strftime_now('%Y') }}",
        "{% generation %}{{ messages[1].tool_calls[0].function.arguments }}{% endgeneration %}",
        "{{ 2 ** 10 * 3 }}{{ '=' * 3 ~ 4 }}{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(mode) }}",
        "nothing",
    ],
)
def test_texts_are_those_of_transformers(tokenizer, template):
    made = tokenizer(template)
    options = {"tools": TOOLS, "add_generation_prompt": True, "mode": {"z": [1, "é"], "a": None}}
    expected = made.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert apply_template(made, MESSAGES, **options) == expected


def test_a_final_message_goes_on(tokenizer):
    options = {"continue_final_message": True}
    made = tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    messages = [*MESSAGES[:1], {"role": "assistant", "content": "and"}]
    expected = made.apply_chat_template(messages, tokenize=False, **options)
    assert apply_template(made, messages, **options) == expected


def test_variables(tokenizer):
    template = "{{ a }}{% generation %}{{ messages }}{{ range(2) }}{% endgeneration %}{% break %}"
    assert template_variables(tokenizer(template)) == {"a", "messages"}
    assert template_variables(tokenizer("{% if")) == template_variables(tokenizer(None)) == set()


DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = "it takes more than 512 MB of memory"
TIME = "it takes more than 0.5 seconds"


@pytest.mark.parametrize(
    "template, said",
    [
        (DOUBLING + "{% endfor %}", MEMORY),
        ("{{ 'a' * 10 ** 10 }}", MEMORY),
        # This computes one number.
        ("{{ 7 ** 30000000 }}", TIME),
        (FOR_EVER, TIME),
        ("{{ 'a' * 2 ** 25 }}", "more than 16,777,216 characters"),
        ("{{ raise_exception('no\nturns') }}", "(no): shorten it"),
        ("{{ raise_exception('') }}", "(TemplateError)"),
        ("{{ namespace(__class__=1) }}", "no attribute '__class__'"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% if", "unexpected"),
    ],
    ids=range(10),
)
def test_what_fails_or_takes_too_much(tokenizer, monkeypatch, template, said):
    if said == TIME:
        guard = Guard(templates._GUARD.path, seconds=0.5)
        monkeypatch.setattr(templates, "_GUARD", guard)
    with pytest.raises(ValueError, match="chat template cannot be filled in") as raised:
        apply_template(tokenizer(template), MESSAGES, remedy="shorten it")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    assert apply_template(tokenizer("{{ messages[0].role }}"), MESSAGES) == "user"
