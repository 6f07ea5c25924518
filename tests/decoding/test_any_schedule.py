"""No text depends on how fast anything is.

Schedules are drawn at random: when a verification is ready, when the pace changes, when a caller
stops. `SCHEDULES=2000` in the environment draws as many for each kind.
"""

import copy
import os
import random
from functools import partial

import mlx.core as mx
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from architecture_models import tiny_architecture
from flash_loops import OTHERS, PROMPT, flash_of
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.policy import Pace, policy_of
from mlx_flashhead.decoding.text import Text
from mlx_flashhead.decoding.verification import Verification, VerifySchedule
from tiny_models import tiny_model

N_SCHEDULES = int(os.environ.get("SCHEDULES", "12"))
N_TOKENS = 24
WINDOW = {"sliding_window": 12, "sliding_window_pattern": 2, "num_hidden_layers": 2}
MODELS = {
    "plain": partial(tiny_model, num_hidden_layers=2),
    "window": partial(tiny_model, "gemma3_text", **WINDOW),
    "states": partial(tiny_architecture, "lfm2", tied=True),
}
SAMPLERS = {
    "greedy": lambda: None,
    "a temperature": lambda: sample_utils.make_sampler(temp=1.0),
    "min-p": lambda: sample_utils.make_sampler(temp=0.8, min_p=0.02),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    dense = MODELS[request.param]()
    mx.eval(dense.parameters())
    flash = flash_of(copy.deepcopy(dense))
    policy = policy_of(flash.head)
    flash.head.n_probes = 1
    policy.adapts = True
    # Proposals run ahead.
    policy.max_risk = 1e9
    policy.max_wait = 1e9
    return dense, flash


@pytest.fixture
def chance(monkeypatch):
    """The random numbers that a schedule is drawn from. Each hand-out is checked."""
    chance = random.Random(1)
    hand_out = Text.hand_out

    def checked(text):
        pending = hand_out(text)
        if text.ahead:
            assert text.marks[0].n_tokens <= text.n_yielded
        else:
            assert text.level
            assert text.n_cached == text.n_yielded
        return pending

    monkeypatch.setattr(Text, "hand_out", checked)
    monkeypatch.setattr(Verification, "ready", property(lambda _: chance.random() < 0.4))
    monkeypatch.setattr(Pace, "dense", property(lambda _: chance.random() < 0.3))
    monkeypatch.setattr(
        VerifySchedule, "_due", property(lambda own: own._n_waiting > chance.randrange(9))
    )
    return chance


def logits_after(model, cache):
    return model(mx.array([[77]]), cache=cache)[0, -1]


def one_text(steps_of, model, sampler, place):
    """The tokens and random states of a text up to a place, and what its cache gives then."""
    mx.random.seed(3)
    cache = make_prompt_cache(model)
    steps = steps_of(mx.array(PROMPT), sampler=sampler, prompt_cache=cache, max_tokens=N_TOKENS)
    found = []
    for token, _ in steps:
        found.append((token, mx.random.state[0].tolist()))
        if len(found) == place:
            break
    steps.close()
    return found, logits_after(model, cache)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_text(pair, chance, sampler, misses):
    dense, flash = pair
    plain = {}
    for seed in range(N_SCHEDULES):
        chance.seed(seed)
        place = chance.randrange(1, N_TOKENS + 1)
        if place not in plain:
            plain[place] = one_text(
                lambda prompt, **options: generate_step(prompt, dense, **options),
                dense,
                SAMPLERS[sampler](),
                place,
            )
        tokens, expected = plain[place]
        ours, logits = one_text(
            lambda prompt, **options: flash.steps(prompt=prompt, **options),
            flash.model,
            SAMPLERS[sampler](),
            place,
        )
        assert ours == tokens, seed
        assert mx.allclose(logits, expected, atol=1e-3), seed
    assert misses


def a_batch(generator, model, samplers, removal):
    """The tokens of each text of a batch, one of which is taken away at a step, with its cache."""
    mx.random.seed(3)
    prompts = [PROMPT, *OTHERS]
    uids = generator.insert(prompts, [N_TOKENS] * len(prompts), samplers=samplers)
    uid = uids[removal[0]]
    n_tokens = removal[1]
    tokens = {uid: [] for uid in uids}
    taken = None
    responses = generator.next_generated()
    while responses:
        for response in responses:
            tokens[response.uid].append(response.token)
        if taken is None and len(tokens[uid]) == n_tokens:
            cache, held = generator.remove([uid], return_prompt_caches=True)[uid][:2]
            taken = held, logits_after(model, cache)
            tokens[uid] = tokens[uid][:n_tokens]
        responses = generator.next_generated()
    return [tokens[uid] for uid in uids], taken


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_of_which_one_draws(pair, chance, sampler):
    dense, flash = pair
    for seed in range(max(N_SCHEDULES // 4, 1)):
        chance.seed(seed)
        removal = chance.randrange(4), chance.randrange(1, N_TOKENS)
        samplers = [None, SAMPLERS[sampler](), None, None]
        expected = a_batch(BatchGenerator(dense), dense, samplers, removal)
        found = a_batch(
            VerifiedBatchGenerator(flash.model, logprobs=False), flash.model, samplers, removal
        )
        assert found[0] == expected[0], seed
        assert found[1][0] == expected[1][0], seed
        assert mx.allclose(found[1][1], expected[1][1], atol=1e-3), seed
