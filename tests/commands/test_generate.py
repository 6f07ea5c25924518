"""``generate``: the text, the flags, and flags that do not go together."""

import importlib
import io
import re
import sys

import mlx.core as mx
import pytest

import mlx_flashhead
from model_folders import VOCAB_SIZE, write_model

# not the function of the same name, which the package has under it
generate_command = importlib.import_module("mlx_flashhead.generate")
N_CLUSTERS = -(-VOCAB_SIZE // 16)
newest = pytest.mark.newest


def test_generate_prints_the_text(run, converted):
    model, tokenizer = mlx_flashhead.load(str(converted))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "One day"}], add_generation_prompt=True
    )
    arguments = ("--model", converted, "--prompt", "One day", "--max-tokens", 8)
    code, output, errors = run("generate", *arguments, "--verbose", "F")
    assert (code, errors) == (0, "")
    assert output == mlx_flashhead.generate(model, tokenizer, prompt, max_tokens=8) + "\n"
    few = run("generate", *arguments, "--verbose", "F", "--n-probes", 1, "--no-check")[1]
    settings = {"n_probes": 1, "check": False}
    assert few == mlx_flashhead.generate(model, tokenizer, prompt, max_tokens=8, **settings) + "\n"
    assert few != output
    code, verbose, errors = run("generate", *arguments)
    assert (code, errors) == (0, "")
    assert output.strip() in verbose and "Generation: 8 tokens" in verbose
    last = rf"FlashHead: 4 of {N_CLUSTERS} clusters a token, \d+ checks, \d+ other choices"
    assert re.fullmatch(last, verbose.splitlines()[-1])


def test_generate_dense_is_mlx_lms_output(run, dense, converted, monkeypatch, capsys):
    arguments = ["--prompt", "One day", "--max-tokens", "8", "--verbose", "F", "--model"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *arguments, str(dense)])
    importlib.import_module("mlx_lm.generate").main()
    expected = capsys.readouterr().out
    assert run("generate", *arguments, converted, "--dense") == (0, expected, "")
    # without a FlashHead there is nothing to convert first
    assert run("generate", *arguments, dense, "--dense") == (0, expected, "")


def test_generate_reads_standard_input(run, converted, monkeypatch):
    arguments = ("--model", converted, "--max-tokens", 8, "--verbose", "F", "--prompt")
    expected = run("generate", *arguments, "One day")
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day"))
    assert run("generate", *arguments, "-") == expected


def test_generate_draws_probes(run, converted):
    arguments = ("--model", converted, "--prompt", "One day", "--ignore-chat-template")
    arguments += ("--max-tokens", 8, "--verbose", "F", "--temp", 1, "--seed", 3)
    code, drawn, errors = run("generate", *arguments, "--draw-probes")
    assert (code, errors) == (0, "")
    mx.random.seed(3)
    model, tokenizer = mlx_flashhead.load(str(converted))  # an empty model's weights are drawn
    sampler = mlx_flashhead.make_sampler(temp=1.0)
    expected = mlx_flashhead.generate(
        model, tokenizer, "One day", max_tokens=8, draw_temperature=1.0, sampler=sampler
    )
    assert drawn == expected + "\n"
    assert run("generate", *arguments)[1] != drawn


def test_generate_samples_with_this_packages_sampler(run, converted, monkeypatch):
    asked = []

    def maker(*arguments, **named):
        asked.append((*arguments, named["top_k"]))
        return mlx_flashhead.make_sampler()

    monkeypatch.setattr(generate_command, "make_sampler", maker)
    arguments = ("--model", converted, "--prompt", "One day", "--max-tokens", 2)
    assert run("generate", *arguments, "--temp", 0.8, "--top-p", 0.9, "--top-k", 5)[0] == 0
    assert asked == [(0.8, 0.9, 0.0, 1, 5)]


def test_generate_without_a_chat_template(run, tmp_path):
    source, target = write_model(tmp_path / "source", chat_template=None), tmp_path / "model"
    arguments = ("--model", source, "--mlx-path", target, "--calibration-positions", 99)
    code, _, errors = run("convert", *arguments)
    assert code == 0 and "rror" not in errors
    code, output, errors = run("generate", "--model", target, "--prompt", "One day")
    assert (code, errors) == (0, "")
    assert "Prompt: 7 tokens" in output


def test_generate_with_a_chat_template_that_raises(refused, tmp_path):
    template = "{{ raise_exception('no \x1b[2Jturns') }}"
    model = write_model(tmp_path / "model", chat_template=template)
    said = refused("generate", "--dense", "--model", model, "--prompt", "One day")
    assert "cannot be filled in (no [2Jturns): give --ignore-chat-template" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "--model is needed"),
        (("--model", "x", "--max-tokens", 0), "--max-tokens is 0"),
        (("--model", "x", "--num-draft-tokens", 0), "--num-draft-tokens is 0"),
        (("--model", "x", "--max-kv-size", 0), "--max-kv-size is 0"),
        pytest.param(("--model", "x", "--prefill-step-size", 0), "size is 0", marks=newest),
        (("--model", "x", "--draft-probes", 2), "add --draft-model"),
        (("--model", "x", "--draw-probes"), "--temp above 0"),
        (("--model", "x", "--draw-probes", "--temp", 1, "--dense"), "no --dense"),
        (("--model", "x", "--dense", "--n-probes", 4), "leave --n-probes out"),
        (("--model", "x", "--temp", "nan"), "--temp is nan: give a number of 0 or more"),
        (("--model", "x", "--n-probes", 0), "--n-probes is 0: give a whole number of 1 or more"),
        (("--model", "x", "--chat-template-config", "{"), "give a JSON object such as"),
        (("--model", "x", "--no-such-flag"), "there is no option --no-such-flag"),
    ],
)
def test_generate_refuses_flags(refused, arguments, said):
    assert said in refused("generate", *arguments)


def test_generate_refuses_prompts_before_it_prints(run, converted):
    arguments = ("--model", converted, "--ignore-chat-template", "--prompt")
    for prompt, said in (
        ("", "The prompt is empty: give at least one token with --prompt"),
        ("x" * 600, "The prompt has 600 tokens, and at most 511 are read"),
    ):
        code, output, errors = run("generate", *arguments, prompt)
        assert (code, output) == (2, "") and errors.startswith(f"error: {said}")


def test_generate_refuses_probes(refused, converted):
    said = refused("generate", "--model", converted, "--n-probes", N_CLUSTERS + 1)
    assert f"n_probes is {N_CLUSTERS + 1}" in said and f"1 to {N_CLUSTERS}" in said
