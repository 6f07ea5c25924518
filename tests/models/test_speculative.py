"""Speculative decoding: FlashHead as target, as draft, as both; the text is the target's own."""

import copy

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_flashhead import get_flash_head, stream_generate
from model_pair import make_pair, uncached

PROMPT = "The river was wide"
TOKENS = 24


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model, whose drafts are mostly rejected."""
    return make_pair(tmp_path_factory.mktemp("other"), tied=True, seed=9)


@pytest.fixture
def drafts(pair, other):
    """Draft models by name; those of ``pair`` are like the target, with settings of their own."""
    more_probes = copy.deepcopy(pair.model)
    get_flash_head(more_probes).n_probes = 9
    return {
        "itself": pair.model,
        "dense": pair.dense,
        "more probes": more_probes,
        "other dense": other.dense,
        "other": other.model,
    }


DRAFTS = ("itself", "dense", "more probes", "other dense", "other")


def run(pair, model, draft, prompt=PROMPT, **options):
    """→ tokens, and how many of them the draft model made."""
    options = {"max_tokens": TOKENS} | options
    stream = stream_generate(model, pair.tokenizer, prompt, draft_model=draft, **options)
    responses = list(stream)
    return [r.token for r in responses], sum(r.from_draft for r in responses)


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
@pytest.mark.parametrize("draft", DRAFTS)
def test_target(pair, drafts, draft, num_draft_tokens):
    found, _ = run(pair, pair.model, drafts[draft], num_draft_tokens=num_draft_tokens)
    assert found == uncached(pair.model, pair.encode(PROMPT), TOKENS)


@pytest.mark.parametrize("draft", DRAFTS)
def test_target_with_every_probe_is_dense(pair, drafts, draft):
    target = copy.deepcopy(pair.model)
    get_flash_head(target).n_probes = pair.head.n_clusters
    found, _ = run(pair, target, drafts[draft], num_draft_tokens=3)
    assert found == uncached(pair.dense, pair.encode(PROMPT), TOKENS)


@pytest.mark.parametrize("draft", ["itself", "more probes", "other"])
def test_draft_of_a_dense_target(pair, drafts, draft):
    found, _ = run(pair, pair.dense, drafts[draft], num_draft_tokens=3)
    assert found == uncached(pair.dense, pair.encode(PROMPT), TOKENS)


def test_drafts_are_taken(pair, drafts):
    """A draft that is the target is right throughout; another one, sometimes wrong."""
    _, all_drafted = run(pair, pair.model, drafts["itself"], num_draft_tokens=3)
    assert all_drafted == TOKENS * 3 // 4
    _, some_drafted = run(pair, pair.model, drafts["dense"], num_draft_tokens=3)
    assert 0 < some_drafted < all_drafted


def test_more_positions_than_max_positions_are_dense(pair, head, drafts):
    """Verification then scores every token, so that the text is the dense model's."""
    ids = pair.encode(PROMPT)
    dense, few = uncached(pair.dense, ids, 8), uncached(pair.model, ids, 8)
    assert dense != few
    for max_positions, expected in ((4, few), (3, dense)):
        head.max_positions = max_positions
        found, _ = run(pair, pair.model, drafts["dense"], num_draft_tokens=3)
        assert found[:8] == expected


def test_logits_processors(pair, drafts):
    """They see every position, and forbid what the model would say."""
    usual = uncached(pair.model, pair.encode(PROMPT), TOKENS)
    processors = make_logits_processors(logit_bias=dict.fromkeys(usual[::5], -1e6))
    options = {"logits_processors": processors, "max_tokens": TOKENS}
    expected = pair.tokens(pair.model, PROMPT, **options)
    assert not {*expected} & {*usual[::5]}
    for draft in DRAFTS:
        assert run(pair, pair.model, drafts[draft], **options)[0] == expected


@pytest.mark.parametrize("draft", DRAFTS)
def test_quantized_caches(pair, drafts, draft):
    options = {"kv_bits": 8, "quantized_kv_start": 0, "prefill_step_size": 1}
    expected = pair.tokens(pair.model, PROMPT, max_tokens=TOKENS, **options)
    assert run(pair, pair.model, drafts[draft], **options)[0] == expected


def test_settings_of_the_call_are_the_targets(pair, drafts):
    ids = pair.encode(PROMPT)
    every = {"n_probes": pair.head.n_clusters, "num_draft_tokens": 3}
    assert run(pair, pair.model, drafts["more probes"], **every)[0] == uncached(
        pair.dense, ids, TOKENS
    )
    dense = {"dense": True, "num_draft_tokens": 3}
    assert run(pair, pair.model, drafts["other"], **dense)[0] == uncached(pair.dense, ids, TOKENS)


def test_two_turns_with_one_cache(pair, other):
    """The caches of both models, one after the other, as mlx-lm takes them."""
    cache = make_prompt_cache(pair.model) + make_prompt_cache(other.model)
    options = {"max_tokens": 9, "prompt_cache": cache, "num_draft_tokens": 3}
    ids = pair.encode(PROMPT)
    found, _ = run(pair, pair.model, other.model, ids, **options)
    assert found == uncached(pair.model, ids, 9)
    for part in cache:  # back to the end of the prompt
        part.trim(part.offset - len(ids))
    more = pair.encode(" and then")
    found, _ = run(pair, pair.model, other.model, more, **options)
    assert found == uncached(pair.model, ids + more, 9)
