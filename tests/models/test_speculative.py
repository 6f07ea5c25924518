"""Speculative decoding: FlashHead as target, as draft, as both; the text is the target's own."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from always_guessing import guess_always
from flash_loops import make_flash
from mlx_flashhead import FlashHead, grammar_processor, make_sampler, stream_generate
from mlx_flashhead.decoding.drafting import drafted_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from model_pair import make_pair

PROMPT = "The river was wide"
TOKENS = 20
QUANTIZED = {"kv_bits": 8, "quantized_kv_start": 0, "prefill_step_size": 1}
OPTIONS = {
    "greedy": lambda pair: {"num_draft_tokens": 3},
    "dense": lambda pair: {"num_draft_tokens": 5, "dense": True},
    "draws": lambda pair: {"sampler": make_sampler(temp=1.5, top_p=0.95, seed=3)},
    "penalty": lambda pair: {"logits_processors": make_logits_processors(repetition_penalty=1.3)},
    "quantized cache": lambda pair: dict(QUANTIZED),
    "grammar": lambda pair: {
        "num_draft_tokens": 3,
        "logits_processors": [grammar_processor(pair.tokenizer, regex="([a-z]{3,9}[,.] ?)+")],
    },
}
CASES = [(name, draft) for name in OPTIONS for draft in ("dense", "other")]
CASES += [("greedy", "itself"), ("greedy", "other dense"), ("draws", "itself")]


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model, whose drafts are mostly rejected."""
    return make_pair(tmp_path_factory.mktemp("other"), tied=True, seed=9)


@pytest.fixture(autouse=True)
def every_offer(monkeypatch):
    guess_always(monkeypatch)


def usual(pair, n_tokens=TOKENS):
    return pair.expected(pair.encode(PROMPT), n_tokens)


def run(pair, model, draft, prompt=PROMPT, **options):
    """→ tokens, and how many of them the draft model made."""
    options = {"max_tokens": TOKENS} | options
    stream = stream_generate(model, pair.tokenizer, prompt, draft_model=draft, **options)
    responses = list(stream)
    return [r.token for r in responses], sum(r.from_draft for r in responses)


# A loop sees no difference between tied and untied embeddings.
@pytest.mark.parametrize("shared_pair", ["tied"], indirect=True)
@pytest.mark.parametrize("name, draft", CASES)
def test_the_text_is_that_without_drafts(pair, other, draft, name):
    options = OPTIONS[name](pair)
    drafts = {"itself": pair.model, "dense": pair.dense}
    drafts |= {"other": other.model, "other dense": other.dense}
    found, n_drafted = run(pair, pair.model, drafts[draft], **options)
    options.pop("num_draft_tokens", None)
    expected = pair.tokens(pair.dense, PROMPT, max_tokens=TOKENS, **options)
    assert found == expected
    assert (expected == usual(pair)) == (name in ("greedy", "dense"))
    # Every draft is right where the normal head chooses. This FlashHead is often wrong.
    if draft == "dense" and name == "dense":
        assert n_drafted >= TOKENS * 3 // 4 - 1
    elif draft == "other" and name == "greedy":
        assert n_drafted < TOKENS // 2
    elif draft in ("itself", "dense") and name == "draws":
        assert n_drafted


@pytest.mark.parametrize("options", [{"verify": False}, {"draw_temperature": 1.0}])
def test_drafts_that_nothing_verifies_are_refused(pair, other, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}.* verifies no guesses: leave `draft_model` out"):
        run(pair, pair.model, other.model, **options)


def test_two_turns_with_one_cache(pair, other):
    """The caches of both models, one after the other, as mlx-lm takes them."""
    cache = make_prompt_cache(pair.model) + make_prompt_cache(other.model)
    options = {"max_tokens": 9, "prompt_cache": cache, "num_draft_tokens": 3}
    ids = pair.encode(PROMPT)
    more = pair.encode(" and then")
    assert run(pair, pair.model, other.model, ids, **options)[0] == usual(pair, 9)
    # They go back to the end of the prompt.
    for part in cache:
        part.trim(part.offset - len(ids))
    assert run(pair, pair.model, other.model, more, **options)[0] == pair.expected(ids + more, 9)


def test_a_draft_scores_the_latest_tokens(pair, other, monkeypatch):
    scored = []
    original = FlashHead.draft_logits
    prompt = {*pair.encode(PROMPT)}

    are_exact = []

    def draft_logits(self, hidden, token_ids, **settings):
        logits = original(self, hidden, token_ids, **settings)
        exact = self.dense_logits(hidden)[..., token_ids]
        are_exact.append(mx.allclose(logits[..., token_ids], exact, atol=1e-4).item())
        scored.append({*token_ids.tolist()})
        return logits

    monkeypatch.setattr(FlashHead, "draft_logits", draft_logits)
    found, _ = run(pair, pair.dense, other.model, num_draft_tokens=1)
    assert found == usual(pair)
    assert are_exact and all(are_exact)
    assert scored[0] == prompt
    assert scored[-1] >= prompt | {found[0]}


WINDOW = {"sliding_window": 24, "sliding_window_pattern": 2, "num_hidden_layers": 2}


def checked_n_drafted(target, draft, prompt, n_tokens, cache=None, dense=False, **options):
    """How many tokens of a text the draft model made. The text is the one without drafts."""
    settings = {
        "proposer": Proposer(target.model, DecodingSettings(dense=dense)),
        "prompt_cache": cache,
    }
    options |= {"max_tokens": n_tokens}
    given = list(drafted_tokens(mx.array(prompt), target.model, draft, **settings, **options))
    assert [token for token, *_ in given] == target.tokens(dense=True, prompt=prompt, **options)
    return sum(drafted for *_, drafted in given)


@pytest.mark.parametrize("n_prompt", [4, 30])
@pytest.mark.parametrize("dense, sampling", [(True, {}), (False, {"temp": 1, "seed": 4})])
def test_drafts_go_on_beyond_a_sliding_window(n_prompt, dense, sampling):
    target, draft = (make_flash("gemma3_text", **WINDOW) for _ in range(2))
    prompt = [(7 * i + 3) % 200 for i in range(n_prompt)]
    options = {"sampler": make_sampler(**sampling), "dense": dense}
    n_drafted = checked_n_drafted(target, draft.model, prompt, 40, **options)
    least = 20 if dense else 5
    assert n_drafted > least


def test_another_processor_is_called_once_a_token(pair, other):
    sizes = []

    def note(tokens, logits):
        sizes.append(tokens.size)
        return logits

    found, n_drafted = run(pair, pair.model, other.dense, logits_processors=[note])
    assert found == usual(pair)
    assert not n_drafted
    assert sizes == list(range(sizes[0], sizes[-1] + 1))
