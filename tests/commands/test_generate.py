"""``generate``: the text of every mode and of structured answers, and the flags."""

import importlib
import io
import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import mlx_lm
import pytest

import mlx_flashhead
from always_guessing import guess_always
from mlx_flashhead.loading.trials import SENTENCE
from mlx_flashhead.models.loading import load_dense
from model_folders import VOCAB_SIZE, write_model
from tiny_adapters import write_adapters

N_CLUSTERS = -(-VOCAB_SIZE // 16)
PROMPT = "The river was wide"
TOKENS = 12
ASK = ("--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", TOKENS, "--verbose", "F")
SCHEMA = {"type": "object", "required": ["name", "on"], "additionalProperties": False}
SCHEMA["properties"] = {"name": {"type": "string", "maxLength": 4}, "on": {"type": "boolean"}}
KV = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
KV_FLAGS = ("--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 0)
# Code of a model's own: a llama whose logits are capped.
CODE = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def __call__(self, *arguments, **options):
        return 8 * mx.tanh(super().__call__(*arguments, **options) / 8)
"""


@pytest.fixture(scope="module")
def right(dense):
    """The dense model's answer, as it is printed."""
    return mlx_flashhead.generate(*load_dense(dense)[:2], PROMPT, max_tokens=TOKENS) + "\n"


@pytest.fixture
def generated(run):
    """A function of flags: what the command prints."""

    def generated(*arguments):
        code, output, errors = run("generate", *ASK, *arguments)
        # The second one is printed where steps are tried.
        assert code == 0 and errors in ("", f"{SENTENCE}\n")
        return output

    return generated


def asked(tokenizer, text, **options):
    """A question's tokens, by the chat template."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], **options)


def test_the_chat_template_and_the_speeds(run, converted, monkeypatch):
    model, tokenizer = mlx_flashhead.load(str(converted))
    prompt = asked(tokenizer, "One day", add_generation_prompt=True)
    expected = mlx_flashhead.generate(model, tokenizer, prompt, max_tokens=8) + "\n"
    arguments = ("generate", "--model", converted, "--max-tokens", 8, "--prompt")
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day"))
    # "-" is standard input.
    for text in ("One day", "-"):
        assert run(*arguments, text, "--verbose", "F") == (0, expected, "")
    # Standard input is at its end.
    for text in ("", "-"):
        code, output, errors = run(*arguments, text)
        assert (code, output) == (2, "") and errors.startswith("error: --prompt is empty: give a t")
    code, verbose, errors = run(*arguments, "One day")
    assert (code, errors) == (0, "")
    assert expected.strip() in verbose and "Generation: 8 tokens" in verbose
    last = rf"FlashHead: 4 of {N_CLUSTERS} clusters a token, \d+ verifications, \d+ proposals "
    assert re.fullmatch(last + "rejected", verbose.splitlines()[-1])


@pytest.mark.parametrize(
    "flags, sampling, options",
    [
        (("--n-probes", 1, "--no-verify"), {}, {"n_probes": 1, "verify": False}),
        (("--temp", 1, "--draw-probes"), {"temp": 1.0}, {"draw_temperature": 1.0}),
        (("--temp", 3, "--top-p", 0.9, "--top-k", 5), {"temp": 3.0, "top_p": 0.9, "top_k": 5}, {}),
        (KV_FLAGS, {}, KV),
    ],
)
def test_flags_are_the_functions_arguments(generated, converted, right, flags, sampling, options):
    found = generated("--model", converted, "--seed", 3, *flags)
    mx.random.seed(3)
    # An empty model's weights are drawn.
    model, tokenizer = mlx_flashhead.load(str(converted))
    options |= {"max_tokens": TOKENS, "sampler": mlx_flashhead.make_sampler(**sampling)}
    assert found == mlx_flashhead.generate(model, tokenizer, PROMPT, **options) + "\n" != right


def test_dense_is_mlx_lms_output(run, dense, converted):
    arguments = ("--prompt", "One day", "--max-tokens", 8, "--verbose", "F", "--model")
    _, expected, _ = run(importlib.import_module("mlx_lm.generate"), *arguments, dense)
    # Without a FlashHead there is nothing to convert first.
    for folder in (converted, dense):
        assert run("generate", *arguments, folder, "--dense") == (0, expected, "")


def test_a_model_without_a_chat_template_or_with_one_that_raises(run, refused, tmp_path):
    source = write_model(tmp_path / "source", chat_template=None)
    target = tmp_path / "model"
    flags = ("--model", source, "--mlx-path", target, "--calibration-positions", 99)
    assert run("convert", *flags)[0] == 0
    code, output, errors = run("generate", "--model", target, "--prompt", "One day")
    assert (code, errors) == (0, "") and "Prompt: 7 tokens" in output
    template = "{{ raise_exception('no \x1b[2Jturns') }}"
    model = write_model(tmp_path / "raises", chat_template=template)
    said = refused("generate", "--dense", "--model", model, "--prompt", "One day")
    assert "cannot be filled in (no [2Jturns): give --ignore-chat-template" in said


def test_draft_models(run, generated, refused, dense, converted, right, monkeypatch):
    """Also the target itself. A draft's FlashHead is used, and a dense folder has none."""
    guess_always(monkeypatch)
    module = importlib.import_module("mlx_flashhead.loading.drafts")
    drafts = []
    load_draft = module.load_draft

    def look(path, **kwargs):
        drafts.append(load_draft(path, **kwargs))
        return drafts[-1]

    monkeypatch.setattr(module, "load_draft", look)
    target = ("--model", converted, "--num-draft-tokens", 4, "--draft-model")
    for draft in ((converted,), (converted, "--draft-probes", 2), (dense,)):
        assert generated(*target, *draft) == right
    assert generated(*target, dense, "--dense") == right
    for draft, said in (
        (converted, "Drafts: a draft model with FlashHead, 1 of 17 clusters a draft"),
        (dense, "Drafts: a draft model without a FlashHead"),
    ):
        code, output, _ = run("generate", *target, draft, "--prompt", PROMPT, "--max-tokens", 6)
        *_, guessed, last = output.splitlines()
        assert code == 0
        assert last == said
        assert re.match(
            r"Guessed: [0-6] of 6 tokens( \(draft model, \d deep, \d+ %\))?, [2-6] steps", guessed
        )
    heads = [mlx_flashhead.get_flash_head(model) for model, _ in drafts]
    # 1 of 17 is a tenth of the bytes.
    assert heads[0].n_probes == 1
    assert heads[1].n_probes == 2 and heads[2] is None
    for draft, said in (((dense,), "has no FlashHead"), ((converted,), "n_probes is 9999")):
        assert said in refused("generate", *target, *draft, "--draft-probes", 9999, *ASK)


def test_a_draft_model_with_another_vocabulary_is_refused_at_once(
    refused, dense, converted, monkeypatch
):
    load = importlib.import_module("mlx_flashhead.loading.load")
    monkeypatch.setattr(load, "load_dense", lambda *_, **__: pytest.fail("loaded"))
    module = importlib.import_module("mlx_flashhead.loading.drafts")
    load_tokenizer = module.load_tokenizer

    def other_for_drafts(folder):
        tokenizer = load_tokenizer(folder)
        return Mock(vocab_size=tokenizer.vocab_size + 7 * (folder == Path(dense)))

    monkeypatch.setattr(module, "load_tokenizer", other_for_drafts)
    said = refused("generate", "--model", converted, "--draft-model", dense, *ASK)
    assert re.search(r"another vocabulary than .* \(26\d and 25\d tokens\)", said)


def test_prompt_cache_file(run, generated, refused, dense, converted, tmp_path):
    """With and without the model's name, which the file knows."""
    prompt_cache = tmp_path / "cache.safetensors"
    flags = ("--model", converted, "--prompt", "Once", "--prompt-cache-file", prompt_cache)
    run(importlib.import_module("mlx_lm.cache_prompt"), *flags)
    # A process that has it gets no FlashHead under `run`.
    del sys.modules["mlx_lm.cache_prompt"]
    found = generated("--prompt-cache-file", prompt_cache)
    assert generated("--prompt-cache-file", prompt_cache, "--model", converted) == found
    model, tokenizer, _ = load_dense(dense)
    ids = asked(tokenizer, "Once", continue_final_message=True) + tokenizer.encode(PROMPT)
    assert found == mlx_flashhead.generate(model, tokenizer, ids, max_tokens=TOKENS) + "\n"
    (tmp_path / "damaged.safetensors").write_text("no cache")
    caches = mlx_lm.models.cache
    caches.save_prompt_cache(
        str(tmp_path / "bare.safetensors"), caches.load_prompt_cache(prompt_cache)
    )
    for wrong, further, said in (
        (prompt_cache, ("--model", dense), "is of"),
        (prompt_cache, ("--draft-model", dense), "leave --draft-model out"),
        (tmp_path / "damaged.safetensors", (), "is damaged, or no safetensors file"),
        (tmp_path / "absent", (), "there is no file"),
        (tmp_path / "bare.safetensors", (), "does not name its model and tokenizer"),
    ):
        assert said in refused("generate", "--prompt-cache-file", wrong, *further, *ASK)


def test_adapters(generated, dense, converted, right, tmp_path):
    adapters = write_adapters(tmp_path / "adapters", dense)
    loaded = mlx_lm.load(str(dense), adapter_path=str(adapters))
    expected = mlx_lm.generate(*loaded, PROMPT, max_tokens=TOKENS) + "\n"
    assert generated("--model", converted, "--adapter-path", adapters) == expected != right


def test_own_code_of_a_model(run, generated, refused, tmp_path):
    further = {"model_type": "of_its_own", "model_file": "own_model.py"}
    dense = write_model(tmp_path / "dense", tied=False, further=further)
    converted = tmp_path / "converted"
    (dense / "own_model.py").write_text(CODE)
    flags = ("--model", dense, "--mlx-path", converted, "--n-probes", 3, "--calibration", "none")
    assert "--trust-remote-code" in refused("convert", *flags)
    assert run("convert", *flags, "--trust-remote-code")[0] == 0
    assert "--trust-remote-code" in refused("generate", "--model", converted, *ASK)
    flags = ("--model", converted, "--trust-remote-code")
    loaded = mlx_flashhead.load(str(converted), trust_remote_code=True)
    expected = mlx_flashhead.generate(*loaded, PROMPT, max_tokens=TOKENS, dense=True) + "\n"
    assert generated(*flags, "--no-verify") != expected
    assert generated(*flags) == generated(*flags, "--draft-model", converted) == expected


def test_refuses_prompts_and_probes_before_it_prints(run, converted):
    for flags, said in (
        (("--prompt", ""), "--prompt is empty: give a text"),
        (
            ("--prompt", "x" * 600),
            "The prompt is longer than this model's 512-token context: shorten it.",
        ),
        (("--dense", "--no-verify"), "--dense uses no FlashHead: leave --no-verify out"),
        (("--n-probes", 99_999_999), f"--n-probes is 99,999,999, but {converted} has "),
        (("--image", "a.png"), f"{converted} is a text model: leave --image out"),
        (("--n-probes", N_CLUSTERS + 1), f"n_probes is {N_CLUSTERS + 1}, but "),
    ):
        code, output, errors = run("generate", "--model", converted, *ASK, *flags)
        assert (code, output) == (2, "") and errors.startswith(f"error: {said}")


@pytest.mark.parametrize("further", [(), ("--dense",), ("--temp", 1, "--seed", 2)])
def test_json_schema(run, generated, converted, tmp_path, further):
    (tmp_path / "schema").write_text(json.dumps(SCHEMA))
    arguments = ("--model", converted, "--json-schema", tmp_path / "schema", *further)
    answer = json.loads(generated(*arguments, "--max-tokens", 80))
    assert list(answer) == ["name", "on"] and isinstance(answer["on"], bool)
    code, output, errors = run("generate", *ASK, *arguments, "--max-tokens", 3)
    assert code == 0 and len(output) < 8
    assert "does not complete the JSON schema: it was cut at --max-tokens 3" in errors


def test_json_schema_on_the_command_line(generated, converted):
    arguments = ("--model", converted, "--max-tokens", 80, "--json-schema")
    schema = '{"type": "integer", "minimum": 10, "maximum": 99}'
    assert 10 <= int(generated(*arguments, schema)) <= 99


def test_regular_expression_and_grammar(generated, converted, tmp_path, monkeypatch):
    arguments = ("--max-tokens", 80, "--model", converted)
    assert re.fullmatch("[0-9]{4}(ab)+c\n", generated(*arguments, "--regex", "[0-9]{4}(ab)+c"))
    (tmp_path / "grammar").write_text('start: "yes" | "no"\n')
    assert generated(*arguments, "--grammar", tmp_path / "grammar") in ("yes\n", "no\n")
    # An answer does not act on a terminal.
    pattern = "a\\x1b\\[2Jb"
    assert generated(*arguments, "--regex", pattern) == "a\x1b[2Jb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generated(*arguments, "--regex", pattern) == "a[2Jb\n"
