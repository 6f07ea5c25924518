"""``generate`` in mlx-lm's other modes: draft models, caches, adapters, a model's own code."""

import importlib
import sys

import mlx_lm
import pytest

import mlx_flashhead
from mlx_flashhead.models.dense import load_dense
from model_folders import write_model
from remote_code import write_remote_model
from tiny_adapters import write_adapters

PROMPT, TOKENS = "The river was wide", 12
ASK = ("--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", TOKENS, "--verbose", "F")


@pytest.fixture(scope="module")
def right(dense):
    """The dense model's answer, as it is printed."""
    model, tokenizer, _ = load_dense(dense)
    return mlx_flashhead.generate(model, tokenizer, PROMPT, max_tokens=TOKENS) + "\n"


@pytest.fixture
def generated(run):
    def generated(*arguments):
        code, output, errors = run("generate", *arguments, *ASK)
        assert (code, errors) == (0, "")
        return output

    return generated


def test_draft_models(generated, refused, dense, converted, right, monkeypatch):
    """Also the target itself. A draft's FlashHead is used, and a dense folder has none."""
    module = importlib.import_module("mlx_flashhead.generate")
    drafts, load_draft = [], module.load_draft

    def look(path, **kwargs):
        drafts.append(load_draft(path, **kwargs))
        return drafts[-1]

    monkeypatch.setattr(module, "load_draft", look)
    target = ("--model", converted, "--num-draft-tokens", 4, "--draft-model")
    for draft in ((converted,), (converted, "--draft-probes", 2), (dense,)):
        assert generated(*target, *draft) == right
    assert generated(*target, dense, "--dense") == right
    heads = [mlx_flashhead.get_flash_head(model) for model, _ in drafts]
    assert heads[0].n_probes == 4  # without figures its own
    assert heads[1].n_probes == 2 and heads[2] is None
    for draft, said in (((dense,), "has no FlashHead"), ((converted,), "n_probes is 9999")):
        assert said in refused("generate", *target, *draft, "--draft-probes", 9999, *ASK)


def cache_prompt(monkeypatch, folder, file):
    argv = ["mlx_lm.cache_prompt", "--model", folder, "--prompt", "Once"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--prompt-cache-file", str(file)])
    importlib.import_module("mlx_lm.cache_prompt").main()


def test_prompt_cache_file(generated, dense, converted, monkeypatch, tmp_path):
    """Made by mlx-lm; with and without the model's name, which the file knows."""
    file = tmp_path / "cache.safetensors"
    cache_prompt(monkeypatch, converted, file)
    found = generated("--prompt-cache-file", file)
    assert generated("--prompt-cache-file", file, "--model", converted) == found
    model, tokenizer, _ = load_dense(dense)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Once"}], continue_final_message=True
    )
    ids += tokenizer.encode(PROMPT)
    assert found == mlx_flashhead.generate(model, tokenizer, ids, max_tokens=TOKENS) + "\n"


def test_prompt_caches_that_do_not_fit(refused, dense, converted, monkeypatch, tmp_path):
    file = tmp_path / "cache.safetensors"
    cache_prompt(monkeypatch, converted, file)
    (tmp_path / "damaged.safetensors").write_text("no cache")
    for wrong, further, said in (
        (file, ("--model", dense), "different model"),
        (file, ("--draft-model", dense), "leave --draft-model out"),
        (tmp_path / "damaged.safetensors", (), "damaged or not a prompt cache"),
        (converted / "model.safetensors", (), "mlx_lm.cache_prompt"),
        (tmp_path / "absent", (), "there is no such file"),
    ):
        assert said in refused("generate", "--prompt-cache-file", wrong, *further, *ASK)


def test_quantized_cache(generated, converted, right):
    flags = ("--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 0)
    options = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0, "max_tokens": TOKENS}
    expected = mlx_flashhead.generate(*mlx_flashhead.load(str(converted)), PROMPT, **options)
    assert generated("--model", converted, *flags) == expected + "\n" != right


def test_cache_of_limited_size(generated, tmp_path):
    """mlx-lm limits the caches of architectures that do not make their own, such as qwen2."""
    dense = write_model(tmp_path / "dense", arch="qwen2")
    found = generated("--model", dense, "--dense", "--max-kv-size", 8)
    model, tokenizer, _ = load_dense(dense)
    options = {"max_tokens": TOKENS, "max_kv_size": 8}
    assert found == mlx_flashhead.generate(model, tokenizer, PROMPT, **options) + "\n"
    assert found != generated("--model", dense, "--dense")


def test_adapters(generated, refused, dense, converted, right, tmp_path):
    adapters = write_adapters(tmp_path / "body", dense)
    loaded = mlx_lm.load(str(dense), adapter_path=str(adapters))
    flags = ("--model", converted, "--adapter-path")
    expected = mlx_lm.generate(*loaded, PROMPT, max_tokens=TOKENS) + "\n"
    assert generated(*flags, adapters) == expected != right
    head = write_adapters(tmp_path / "head", dense, keys=("lm_head",))
    assert "must be fused first" in refused("generate", *flags, head, *ASK)


def test_own_code_of_a_model(run, generated, refused, tmp_path):
    dense, converted = write_remote_model(tmp_path / "dense"), tmp_path / "converted"
    flags = ("--model", dense, "--mlx-path", converted, "--n-probes", 3, "--calibration", "none")
    assert "--trust-remote-code" in refused("convert", *flags)
    assert run("convert", *flags, "--trust-remote-code")[0] == 0
    assert "--trust-remote-code" in refused("generate", "--model", converted, *ASK)
    found = generated("--model", converted, "--trust-remote-code")
    model, tokenizer = mlx_flashhead.load(str(converted), trust_remote_code=True)
    assert found == mlx_flashhead.generate(model, tokenizer, PROMPT, max_tokens=TOKENS) + "\n"
    drafted = ("--model", converted, "--trust-remote-code", "--draft-model", converted)
    assert generated(*drafted) == found
