"""Prompt caches: saved, loaded, rotating, quantized."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from mlx_flashhead.models.compat.generate import generate_step
from model_pair import uncached

PROMPT = "How do I bake bread for two people"
PREFIX = 20  # tokens of it that are cached beforehand
QUANTIZED = [{"kv_bits": bits, "quantized_kv_start": start} for bits in (8, 4) for start in (0, 25)]


def fill(model, cache, ids, **options):
    """Puts ``ids`` into a cache as ``mlx_lm.cache_prompt`` does."""
    for _ in generate_step(mx.array(ids), model, max_tokens=0, prompt_cache=cache, **options):
        pass


@pytest.mark.parametrize("prefill_step_size", [1, 7, 512])
def test_prompts_in_parts(pair, prefill_step_size):
    ids, options = pair.encode(PROMPT), {"prefill_step_size": prefill_step_size}
    assert pair.tokens(pair.model, ids, **options) == uncached(pair.dense, ids)
    assert pair.tokens(pair.model, ids, check=False, **options) == pair.bare(ids)


@pytest.mark.parametrize("made_by", ["model", "dense"])
def test_saved_and_loaded(pair, tmp_path, made_by):
    """A cache holds nothing of the head: one made without FlashHead serves as well."""
    ids, file = pair.encode(PROMPT), str(tmp_path / "cache.safetensors")
    cache = make_prompt_cache(pair.model)
    fill(getattr(pair, made_by), cache, ids[:PREFIX])
    save_prompt_cache(file, cache)
    expected = uncached(pair.dense, ids)
    assert expected != uncached(pair.dense, [*pair.encode("W"), *ids[1:]])  # all tokens matter
    for _ in range(2):
        loaded = load_prompt_cache(file)
        assert loaded[0].offset == PREFIX
        assert pair.tokens(pair.model, ids[PREFIX:], prompt_cache=loaded) == expected


def rotating(model):
    """A cache that holds 16 tokens, in which prompt and answer have no room."""
    return [RotatingKVCache(max_size=16, keep=4) for _ in model.layers]


def test_rotating(pair, tmp_path):
    ids, file = pair.encode(PROMPT), str(tmp_path / "cache.safetensors")
    options = {"max_tokens": 20, "prefill_step_size": 1}  # or the parts would attend otherwise
    expected = pair.tokens(pair.dense, ids, prompt_cache=rotating(pair.dense), **options)
    assert expected != uncached(pair.dense, ids, 20)
    cache = rotating(pair.model)
    fill(pair.model, cache, ids[:PREFIX], prefill_step_size=1)
    save_prompt_cache(file, cache)
    loaded = load_prompt_cache(file)
    assert isinstance(loaded[0], RotatingKVCache)
    assert pair.tokens(pair.model, ids[PREFIX:], prompt_cache=loaded, **options) == expected


@pytest.mark.parametrize("options", QUANTIZED)
def test_quantized(pair, tmp_path, options):
    ids, file = pair.encode(PROMPT), str(tmp_path / "cache.safetensors")
    options = options | {"prefill_step_size": 1}
    expected = pair.tokens(pair.dense, ids, **options)
    assert pair.tokens(pair.model, ids, **options) == expected
    cache = make_prompt_cache(pair.model)
    fill(pair.model, cache, ids[:PREFIX], **options)
    save_prompt_cache(file, cache)
    found = pair.tokens(pair.model, ids[PREFIX:], prompt_cache=load_prompt_cache(file), **options)
    assert found == expected
