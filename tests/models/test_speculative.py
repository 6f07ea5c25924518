"""Speculative decoding: FlashHead as target, as draft, as both; the text is the target's own."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_flashhead import FlashHead, grammar_processor, make_sampler, stream_generate
from model_pair import make_pair, uncached, until_end

PROMPT = "The river was wide"
TOKENS = 24


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model, whose drafts are mostly rejected."""
    return make_pair(tmp_path_factory.mktemp("other"), tied=True, seed=9)


@pytest.fixture
def drafts(pair, other):
    """Draft models by name."""
    return {
        "itself": pair.model,
        "dense": pair.dense,
        "other dense": other.dense,
        "other": other.model,
    }


DRAFTS = ("itself", "dense", "other dense", "other")


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
    assert found == uncached(pair.dense, pair.encode(PROMPT), TOKENS)


@pytest.mark.parametrize("draft", DRAFTS)
def test_draws_are_those_without_drafts(pair, drafts, draft):
    options = {"sampler": make_sampler(temp=1.5, top_p=0.95, seed=3), "max_tokens": TOKENS}
    expected = pair.tokens(pair.dense, PROMPT, **options)
    found, n_drafted = run(pair, pair.model, drafts[draft], num_draft_tokens=3, **options)
    assert found == expected
    assert n_drafted > TOKENS // 2 or draft not in ("itself", "dense")


def test_a_dense_target(pair, drafts):
    found, _ = run(pair, pair.model, drafts["other"], num_draft_tokens=3, dense=True)
    assert found == uncached(pair.dense, pair.encode(PROMPT), TOKENS)


@pytest.mark.parametrize("settings", [{"check": False}, {"check": False, "n_probes": 1}], ids=str)
def test_without_the_check_it_is_the_bare_heads_text(pair, head, drafts, settings):
    found, _ = run(pair, pair.model, drafts["dense"], num_draft_tokens=3, **settings)
    head.n_probes = settings.get("n_probes", head.n_probes)
    ids = pair.encode(PROMPT)
    expected = until_end(pair, uncached(pair.model, ids, TOKENS))
    assert found[: len(expected)] == expected != uncached(pair.dense, ids, TOKENS)


@pytest.mark.parametrize("draft", ["itself", "other"])
def test_draft_of_a_dense_target(pair, drafts, draft):
    found, _ = run(pair, pair.dense, drafts[draft], num_draft_tokens=3)
    assert found == uncached(pair.dense, pair.encode(PROMPT), TOKENS)


def test_drafts_are_taken(pair, drafts):
    """A draft that is the target is right throughout; another one, never."""
    _, all_drafted = run(pair, pair.model, drafts["dense"], num_draft_tokens=3)
    assert all_drafted == TOKENS * 3 // 4
    _, some_drafted = run(pair, pair.model, drafts["other"], num_draft_tokens=3)
    assert some_drafted < all_drafted


def test_more_positions_than_max_positions_are_dense(pair, head, drafts):
    """Verification then scores every token, also without the check."""
    ids = pair.encode(PROMPT)
    dense, few = uncached(pair.dense, ids, 8), uncached(pair.model, ids, 8)
    assert dense != few
    for max_positions, expected in ((4, few), (3, dense)):
        head.max_positions = max_positions
        found, _ = run(pair, pair.model, drafts["dense"], num_draft_tokens=3, check=False)
        assert found[:8] == expected


def test_logits_processors(pair, drafts):
    """They see every position, and forbid what the model would say."""
    usual = uncached(pair.dense, pair.encode(PROMPT), TOKENS)
    processors = make_logits_processors(logit_bias=dict.fromkeys(usual[::5], -1e6))
    options = {"logits_processors": processors, "max_tokens": TOKENS}
    expected = pair.tokens(pair.dense, PROMPT, **options)
    assert not {*expected} & {*usual[::5]}
    for draft in DRAFTS:
        assert run(pair, pair.model, drafts[draft], **options)[0] == expected


@pytest.mark.parametrize("draft", DRAFTS)
def test_quantized_caches(pair, drafts, draft):
    options = {"kv_bits": 8, "quantized_kv_start": 0, "prefill_step_size": 1}
    expected = pair.tokens(pair.dense, PROMPT, max_tokens=TOKENS, **options)
    assert run(pair, pair.model, drafts[draft], **options)[0] == expected


def test_two_turns_with_one_cache(pair, other):
    """The caches of both models, one after the other, as mlx-lm takes them."""
    cache = make_prompt_cache(pair.model) + make_prompt_cache(other.model)
    options = {"max_tokens": 9, "prompt_cache": cache, "num_draft_tokens": 3}
    ids = pair.encode(PROMPT)
    found, _ = run(pair, pair.model, other.model, ids, **options)
    assert found == uncached(pair.dense, ids, 9)
    for part in cache:  # back to the end of the prompt
        part.trim(part.offset - len(ids))
    more = pair.encode(" and then")
    found, _ = run(pair, pair.model, other.model, more, **options)
    assert found == uncached(pair.dense, ids + more, 9)


@pytest.mark.parametrize("draft", DRAFTS)
def test_grammars(pair, drafts, draft):
    """They mask the drafts too, so that a draft gains as much as without them."""
    grammar = grammar_processor(pair.tokenizer, regex="([a-z]{3,9}[,.] ?)+")
    options = {"logits_processors": [grammar], "max_tokens": TOKENS}
    expected = pair.tokens(pair.dense, PROMPT, **options)
    assert expected != uncached(pair.dense, pair.encode(PROMPT), TOKENS)
    found, n_drafted = run(pair, pair.model, drafts[draft], num_draft_tokens=3, **options)
    assert found == expected
    if draft in ("itself", "dense"):  # every draft is accepted
        assert n_drafted == TOKENS * 3 // 4


def test_a_draft_scores_the_latest_tokens(pair, other, monkeypatch):
    scored = []
    original = FlashHead.draft_logits

    def draft_logits(self, hidden, token_ids):
        logits = original(self, hidden, token_ids)
        exact = self.dense_logits(hidden)[..., token_ids]
        assert mx.allclose(logits[..., token_ids], exact, atol=1e-4)
        scored.append(set(token_ids.tolist()))
        return logits

    monkeypatch.setattr(FlashHead, "draft_logits", draft_logits)
    found, _ = run(pair, pair.dense, other.model, num_draft_tokens=1)
    assert found == uncached(pair.dense, pair.encode(PROMPT), TOKENS)
    assert scored[0] == set(pair.encode(PROMPT)) and scored[-1] >= {*pair.encode(PROMPT), found[0]}
