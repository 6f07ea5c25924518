"""``generate`` in mlx-lm's other modes: draft models, caches, adapters, a model's own code."""

import importlib
import json
import sys

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import mlx_flashhead
from model_folders import VOCAB_SIZE, write_tokenizer
from model_pair import make_pair, uncached
from remote_code import write_remote_model
from tiny_adapters import write_adapters
from tiny_models import CONFIGS, tiny_model

ASK = ("--prompt", "The river was wide", "--ignore-chat-template", "--max-tokens", 12)
ASK += ("--verbose", "F")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), tied=False)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("other"), tied=True, seed=9)


def text_of(pair, tokens):
    """As mlx-lm prints it while it is made."""
    detokenizer = pair.tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text + "\n"


def answer(pair, model):
    return text_of(pair, uncached(model, pair.encode(ASK[1]), 12))


def generated(run, *arguments):
    code, output, errors = run("generate", *arguments)
    assert (code, errors) == (0, "")
    return output


@pytest.mark.parametrize("draft", ["itself", "its dense form", "another", "another dense"])
def test_draft_models(run, pair, other, draft):
    """Also of the target's own folder: the target keeps its FlashHead."""
    folder = {
        "itself": pair.folder,
        "its dense form": pair.dense_folder,
        "another": other.folder,
        "another dense": other.dense_folder,
    }[draft]
    flags = ("--model", pair.folder, "--draft-model", folder, "--num-draft-tokens", 4)
    assert generated(run, *flags, *ASK) == answer(pair, pair.dense)
    assert generated(run, *flags, "--dense", *ASK) == answer(pair, pair.dense)


def test_drafts_come_from_a_flash_head(run, pair, monkeypatch):
    """A draft's FlashHead is used, and a dense folder has none."""
    module = importlib.import_module("mlx_flashhead.generate")
    drafts, load_draft = [], module.load_draft

    def look(path, **kwargs):
        drafts.append(load_draft(path, **kwargs))
        return drafts[-1]

    monkeypatch.setattr(module, "load_draft", look)
    for folder, flags in (
        (pair.folder, ()),
        (pair.folder, ("--draft-probes", 2)),
        (pair.dense_folder, ()),
    ):
        target = ("--model", pair.folder, "--n-probes", 5)
        generated(run, *target, "--draft-model", folder, *flags, *ASK)
    heads = [mlx_flashhead.get_flash_head(model) for model, _ in drafts]
    assert heads[0].n_probes == 3  # without figures its own
    assert heads[1].n_probes == 2 and heads[2] is None


def test_wrong_draft_probes(refused, pair):
    model = ("--model", pair.folder, "--draft-probes")
    assert "add --draft-model" in refused("generate", *model, 2, *ASK)
    dense = ("--draft-model", pair.dense_folder)
    assert "has no FlashHead" in refused("generate", *model, 2, *dense, *ASK)
    many = ("--draft-model", pair.folder)
    assert "n_probes is 9999" in refused("generate", *model, 9999, *many, *ASK)


def cache_prompt(monkeypatch, folder, file, *flags):
    argv = ["mlx_lm.cache_prompt", "--model", folder, "--prompt", "Once", *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--prompt-cache-file", str(file)])
    importlib.import_module("mlx_lm.cache_prompt").main()


@pytest.mark.parametrize("kv", [(), ("--kv-bits", 8, "--quantized-kv-start", 0)])
def test_prompt_cache_file(run, pair, monkeypatch, tmp_path, kv):
    """Made by mlx-lm; with and without the model's name, which the file knows."""
    file = tmp_path / "cache.safetensors"
    cache_prompt(monkeypatch, pair.folder, file, *kv)
    found = generated(run, "--prompt-cache-file", file, *kv, *ASK)
    assert generated(run, "--prompt-cache-file", file, "--model", pair.folder, *kv, *ASK) == found
    if not kv:
        before = pair.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Once"}], continue_final_message=True
        )
        ids = uncached(pair.dense, before + pair.encode(ASK[1]), 12)
        assert found == text_of(pair, ids)


def test_prompt_caches_that_do_not_fit(refused, pair, other, monkeypatch, tmp_path):
    file, flag = tmp_path / "cache.safetensors", "--prompt-cache-file"
    cache_prompt(monkeypatch, pair.folder, file)
    said = refused("generate", flag, file, "--model", other.folder, *ASK)
    assert "different model" in said
    said = refused("generate", flag, file, "--draft-model", other.folder, *ASK)
    assert "leave --draft-model out" in said
    (tmp_path / "damaged.safetensors").write_text("no cache")
    for wrong in (tmp_path / "damaged.safetensors", pair.folder / "model.safetensors"):
        said = refused("generate", flag, wrong, "--model", pair.folder, *ASK)
        assert str(wrong) in said and "mlx_lm.cache_prompt" in said


def test_quantized_cache(run, pair):
    flags = ("--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 0)
    options = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    expected = text_of(pair, pair.tokens(pair.model, ASK[1], **options))
    assert generated(run, "--model", pair.folder, *flags, *ASK) == expected
    assert expected != answer(pair, pair.dense)


def test_cache_of_limited_size(run, tmp_path):
    """mlx-lm limits the caches of architectures that do not make their own, such as qwen2."""
    config = {"model_type": "qwen2", "tie_word_embeddings": True, **CONFIGS["qwen2"]}
    config |= {"vocab_size": VOCAB_SIZE, "eos_token_id": 1}
    model, dense = tiny_model("qwen2", vocab_size=VOCAB_SIZE), tmp_path / "dense"
    dense.mkdir()
    weights = tree_flatten(model.parameters(), destination={})
    mx.save_safetensors(str(dense / "model.safetensors"), weights, metadata={"format": "mlx"})
    (dense / "config.json").write_text(json.dumps(config))
    write_tokenizer(dense)
    converted = tmp_path / "converted"
    options = {"n_probes": 3, "calibration": "none", "progress": False}
    mlx_flashhead.convert(str(dense), str(converted), **options)
    model, tokenizer = mlx_flashhead.load(str(converted))
    limited = generated(run, "--model", converted, "--max-kv-size", 8, *ASK)
    options = {"max_tokens": 12, "max_kv_size": 8}
    assert limited == mlx_flashhead.generate(model, tokenizer, ASK[1], **options) + "\n"
    assert limited != generated(run, "--model", converted, *ASK)


def test_adapters(run, refused, pair, tmp_path):
    adapters = write_adapters(tmp_path / "body", pair.dense_folder)
    model, _ = mlx_lm.load(str(pair.dense_folder), adapter_path=str(adapters))
    flags = ("--model", pair.folder, "--adapter-path")
    assert generated(run, *flags, adapters, *ASK) == answer(pair, model)
    assert answer(pair, model) != answer(pair, pair.dense)
    head = write_adapters(tmp_path / "head", pair.dense_folder, keys=("lm_head",))
    assert "must be fused first" in refused("generate", *flags, head, *ASK)


def test_own_code_of_a_model(run, refused, tmp_path):
    dense, converted = write_remote_model(tmp_path / "dense"), tmp_path / "converted"
    flags = ("--model", dense, "--mlx-path", converted, "--n-probes", 3, "--calibration", "none")
    assert "--trust-remote-code" in refused("convert", *flags)
    assert run("convert", *flags, "--trust-remote-code")[0] == 0
    assert "--trust-remote-code" in refused("generate", "--model", converted, *ASK)
    found = generated(run, "--model", converted, "--trust-remote-code", *ASK)
    model, tokenizer = mlx_flashhead.load(str(converted), trust_remote_code=True)
    assert found == mlx_flashhead.generate(model, tokenizer, ASK[1], max_tokens=12) + "\n"
    drafted = ("--model", converted, "--trust-remote-code", "--draft-model", converted)
    assert generated(run, *drafted, *ASK) == found


@pytest.mark.parametrize("flag", ["--num-draft-tokens", "--max-kv-size", "--prefill-step-size"])
def test_numbers_that_are_too_small(refused, flag):
    assert f"{flag} is 0" in refused("generate", "--model", "x", flag, 0)
