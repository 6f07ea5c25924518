"""A draft model: what its caches hold, and when it pays."""

import copy
import random
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from always_guessing import guess_always
from architecture_models import tiny_architecture
from flash_loops import PROMPT, flash_of
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.drafting import drafted_tokens
from mlx_flashhead.decoding.guessing.depth import BOUND, START
from mlx_flashhead.decoding.guessing.draft_model import MOST_BACK, DraftModel, draft_cost
from mlx_flashhead.decoding.guessing.guesser import LatestToken
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.wide.step import WideSteps
from tiny_models import tiny_model

N_TOKENS = 20
VOCAB_SIZE = 200
WINDOW = {"sliding_window": 12, "sliding_window_pattern": 2, "num_hidden_layers": 2}
DRAFTS = {
    "plain": partial(tiny_model, num_hidden_layers=1),
    "window": partial(tiny_model, "gemma3_text", **WINDOW),
    "states": partial(tiny_architecture, "lfm2", tied=True),
}
CHEAP = {2: 1.06, 4: 1.4, 8: 2.4}


def trimmed(layer):
    layer.trim(1)
    return layer


@pytest.mark.parametrize("n_prompt", [6, 3 * MOST_BACK])
@pytest.mark.parametrize("name", DRAFTS)
def test_it_drafts_as_if_it_had_read_the_text_alone(name, n_prompt):
    """After wrong drafts, single steps, and a text that goes back: past a window's end, too."""
    chance = random.Random(len(name) + n_prompt)
    model = DRAFTS[name]()
    target = tiny_model(seed=3)
    text = SimpleNamespace(
        vocab_size=VOCAB_SIZE,
        n_chosen=0,
        pick=lambda logits, logprobs, place: mx.argmax(logits, axis=-1),
    )
    drafting = DraftModel(model, target, make_prompt_cache(model), 7)
    heard = [chance.randrange(VOCAB_SIZE) for _ in range(n_prompt)]
    drafting.hear(list(heard), None)
    n_text = 0
    for _ in range(40):
        latest = chance.randrange(VOCAB_SIZE)
        n = chance.choice([0, 1, 3, 7])
        kept = [latest]
        if n:
            offer = drafting.offer(text, LatestToken(mx.array([latest])))
            drafts = offer.make(n).tolist()
            fresh = DraftModel(model, target, make_prompt_cache(model), 7)
            fresh.hear(list(heard), None)
            assert drafts == fresh.offer(text, LatestToken(mx.array([latest]))).make(n).tolist()
            n_right = chance.randrange(n + 1)
            drafting.judge(n, n_right)
            kept += drafts[:n_right]
        drafting.hear(kept, None)
        heard += kept
        n_text += len(kept)
        if chance.random() < 0.4:
            n_back = chance.randrange(1, 1 + min(n_text, MOST_BACK))
            drafting.take_back(n_back)
            del heard[-n_back:]
            n_text -= n_back
    drafting.leave()
    assert drafting.fed == heard


def test_the_cost_of_a_draft_goes_by_the_bytes():
    target = tiny_model(num_hidden_layers=4)
    draft = tiny_model(num_hidden_layers=1)
    cost = draft_cost(draft, target)
    assert 0.25 < cost < 1
    flash = flash_of(copy.deepcopy(draft))
    flash.head.n_probes = 1
    assert draft_cost(flash.model, target) < cost
    assert draft_cost(target, target) == 1


@pytest.fixture
def drafted(monkeypatch):
    """The tokens of a text with drafts where a step of several tokens is cheap; its proposer."""
    monkeypatch.setattr(WideSteps, "costs", lambda wide, caches: CHEAP)

    def run(target, draft, n_tokens=200):
        proposer = Proposer(target)
        steps = drafted_tokens(
            mx.array(PROMPT),
            target,
            draft,
            proposer=proposer,
            num_draft_tokens=3,
            max_tokens=n_tokens,
        )
        return [token for token, *_ in steps], proposer

    return run


def plain(model, n_tokens=200):
    return [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=n_tokens)]


def test_drafts_that_do_not_pay_lose_little(drafted):
    """The FlashHead goes on proposing then."""
    dense = tiny_model(num_hidden_layers=4)
    expected = plain(dense)
    target = flash_of(dense).model
    draft = tiny_model(num_hidden_layers=1, seed=8)
    tokens, proposer = drafted(target, draft)
    assert tokens == expected
    guesses = proposer.judged["draft model"]
    cost = draft_cost(draft, target)
    lost = sum(CHEAP[n + 1] + n * cost - 1 - n_right for n, n_right in guesses)
    assert guesses and lost <= START + BOUND * proposer.n_steps
    assert len(guesses) < proposer.n_steps / 10 and proposer.n_verifications


def test_drafts_that_pay_are_made(drafted, monkeypatch):
    target = tiny_model(num_hidden_layers=4)
    monkeypatch.setattr("mlx_flashhead.decoding.guessing.draft_model.draft_cost", lambda *_: 0.1)
    tokens, proposer = drafted(target, copy.deepcopy(target))
    assert tokens == plain(target)
    assert proposer.n_steps < len(tokens) / 3
    monkeypatch.setattr("mlx_flashhead.decoding.guessing.draft_model.draft_cost", lambda *_: 0.9)
    _, proposer = drafted(target, copy.deepcopy(target))
    assert proposer.n_steps >= len(tokens) - 1 and not proposer.judged


@pytest.fixture
def every_offer(monkeypatch):
    guess_always(monkeypatch)


@pytest.mark.usefixtures("every_offer")
def test_its_cache_serves_the_next_turn():
    target = flash_of(tiny_model(num_hidden_layers=2)).model
    drafting = tiny_model(num_hidden_layers=1, seed=4)
    cache = make_prompt_cache(target) + make_prompt_cache(drafting)
    held = list(PROMPT)
    for turn in ([], [5, 9, 77], [60]):
        if turn:
            # The caches hold all but the last token.
            context = held[:-1]
            prompt = held[-1:] + turn
        else:
            context = []
            prompt = held
        steps = drafted_tokens(
            mx.array(prompt),
            target,
            drafting,
            proposer=Proposer(target),
            prompt_cache=cache,
            context=context,
            max_tokens=9,
        )
        held += [*turn, *(token for token, *_ in steps)]
        lengths = {layer.offset for layer in cache}
        assert lengths == {len(held)}
        cache = [*map(trimmed, cache)]


@pytest.mark.usefixtures("every_offer")
def test_its_cache_serves_the_next_turn_whatever_came_before():
    """Nobody says what the caches of both models hold."""
    model = tiny_model(num_hidden_layers=2)
    cache = make_prompt_cache(model) + make_prompt_cache(model)
    for turn in (PROMPT, [5, 9, 77], [60]):
        proposer = Proposer(model)
        steps = drafted_tokens(
            mx.array(turn),
            model,
            # All of its drafts are right.
            copy.deepcopy(model),
            proposer=proposer,
            num_draft_tokens=3,
            prompt_cache=cache,
            max_tokens=N_TOKENS,
        )
        assert len(list(steps)) == N_TOKENS
        assert proposer.n_steps < N_TOKENS / 2
        assert len({layer.offset for layer in cache}) == 1


@pytest.mark.usefixtures("every_offer")
def test_it_may_have_fewer_tokens_than_top_k():
    target = tiny_model(num_hidden_layers=2)
    draft = tiny_model(num_hidden_layers=1, vocab_size=60)
    for make in (sample_utils.make_sampler, make_sampler):
        options = {"sampler": make(temp=1.0, top_k=80), "max_tokens": 9}
        texts = []
        for steps_of in (partial(drafted_tokens, draft_model=draft), verified_tokens):
            mx.random.seed(3)
            steps = steps_of(mx.array(PROMPT), target, proposer=Proposer(target), **options)
            texts.append([token for token, *_ in steps])
        assert texts[0] == texts[1]
