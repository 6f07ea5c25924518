"""Speculative decoding: FlashHead as target, as draft, as both; the text is the target's own."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_flashhead import FlashHead, grammar_processor, make_sampler, stream_generate
from model_pair import make_pair, uncached, until_end

PROMPT = "The river was wide"
TOKENS = 24
DRAFTS = ("itself", "dense", "other dense", "other")
OPTIONS = {
    "greedy": lambda pair: {"num_draft_tokens": 3},
    "one draft at a time": lambda pair: {"num_draft_tokens": 1},
    "dense": lambda pair: {"num_draft_tokens": 5, "dense": True},
    "draws": lambda pair: {"sampler": make_sampler(temp=1.5, top_p=0.95, seed=3)},
    "bias": lambda pair: {"logits_processors": forbidding(usual(pair)[::5])},
    "quantized cache": lambda pair: {
        "kv_bits": 8, "quantized_kv_start": 0, "prefill_step_size": 1,
    },
    # masks the drafts too, so that a draft gains as much as without it
    "grammar": lambda pair: {
        "num_draft_tokens": 3,
        "logits_processors": [grammar_processor(pair.tokenizer, regex="([a-z]{3,9}[,.] ?)+")],
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model, whose drafts are mostly rejected."""
    return make_pair(tmp_path_factory.mktemp("other"), tied=True, seed=9)


@pytest.fixture
def drafts(pair, other):
    """Draft models by name."""
    models = (pair.model, pair.dense, other.dense, other.model)
    return dict(zip(DRAFTS, models, strict=True))


def usual(pair, n_tokens=TOKENS):
    return uncached(pair.dense, pair.encode(PROMPT), n_tokens)


def forbidding(tokens):
    return make_logits_processors(logit_bias=dict.fromkeys(tokens, -1e6))


def run(pair, model, draft, prompt=PROMPT, **options):
    """→ tokens, and how many of them the draft model made."""
    options = {"max_tokens": TOKENS} | options
    stream = stream_generate(model, pair.tokenizer, prompt, draft_model=draft, **options)
    responses = list(stream)
    return [r.token for r in responses], sum(r.from_draft for r in responses)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_text_is_that_without_drafts(pair, drafts, draft, name):
    options = OPTIONS[name](pair)
    found, n_drafted = run(pair, pair.model, drafts[draft], **options)
    options.pop("num_draft_tokens", None)
    expected = pair.tokens(pair.dense, PROMPT, max_tokens=TOKENS, **options)
    assert found == expected
    assert (expected == usual(pair)) == (name in ("greedy", "one draft at a time", "dense"))
    if draft == "dense" and name in ("greedy", "grammar"):  # every draft is right
        assert n_drafted == TOKENS * 3 // 4
    elif draft == "other" and name == "greedy":
        assert n_drafted < TOKENS // 2
    elif draft in ("itself", "dense") and name == "draws":
        assert n_drafted > TOKENS // 2


@pytest.mark.parametrize("draft", ["itself", "other"])
def test_draft_of_a_dense_target(pair, drafts, draft):
    found, _ = run(pair, pair.dense, drafts[draft], num_draft_tokens=3)
    assert found == usual(pair)


@pytest.mark.parametrize("settings", [{"verify": False}, {"verify": False, "n_probes": 1}], ids=str)
def test_without_the_check_it_is_the_bare_heads_text(pair, head, drafts, settings):
    found, _ = run(pair, pair.model, drafts["dense"], num_draft_tokens=3, **settings)
    head.n_probes = settings.get("n_probes", head.n_probes)
    expected = until_end(pair, uncached(pair.model, pair.encode(PROMPT), TOKENS))
    assert found[: len(expected)] == expected != usual(pair)


def test_more_positions_than_max_positions_are_dense(pair, head, drafts):
    """Verification then scores every token, also without the check."""
    few = uncached(pair.model, pair.encode(PROMPT), 8)
    assert usual(pair, 8) != few
    for max_positions, expected in ((4, few), (3, usual(pair, 8))):
        head.max_positions = max_positions
        found, _ = run(pair, pair.model, drafts["dense"], num_draft_tokens=3, verify=False)
        assert found[:8] == expected


def test_two_turns_with_one_cache(pair, other):
    """The caches of both models, one after the other, as mlx-lm takes them."""
    cache = make_prompt_cache(pair.model) + make_prompt_cache(other.model)
    options = {"max_tokens": 9, "prompt_cache": cache, "num_draft_tokens": 3}
    ids, more = pair.encode(PROMPT), pair.encode(" and then")
    found, _ = run(pair, pair.model, other.model, ids, **options)
    assert found == usual(pair, 9)
    for part in cache:  # back to the end of the prompt
        part.trim(part.offset - len(ids))
    found, _ = run(pair, pair.model, other.model, more, **options)
    assert found == uncached(pair.dense, ids + more, 9)


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
    assert found == usual(pair)
    assert scored[0] == set(pair.encode(PROMPT)) and scored[-1] >= {*pair.encode(PROMPT), found[0]}
