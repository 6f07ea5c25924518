"""Batches: at once, continuously, with caches, and above ``max_positions``."""

import pytest

from mlx_flashhead import batch_generate
from mlx_flashhead.lossless.batch import CheckedBatchGenerator
from mlx_flashhead.lossless.proposals import Proposer
from model_pair import uncached, until_end

PROMPTS = ("One day", "How do I bake bread?", "x", "Why is the sky blue", "It was", "The river")
TOKENS = 12


@pytest.fixture
def prompts(pair):
    return [pair.encode(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("sizes", [{}, {"completion_batch_size": 2, "prefill_batch_size": 2}])
@pytest.mark.parametrize("settings", [{}, {"dense": True}, {"check": False}], ids=str)
def test_batch_is_what_each_gets_alone(pair, prompts, sizes, settings):
    expected = [uncached(pair.dense, ids, TOKENS) for ids in prompts]
    if settings == {"check": False}:
        expected = [pair.bare(ids, TOKENS) for ids in prompts]
    expected = [until_end(pair, tokens) for tokens in expected]
    options = {"max_tokens": TOKENS, "return_token_ids": True, **sizes, **settings}
    assert batch_generate(pair.model, pair.tokenizer, prompts, **options).token_ids == expected


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="Sequence 1 has an empty prompt: give it at least one"):
        batch_generate(pair.model, pair.tokenizer, [[5], []])


def test_batch_of_several_turns(pair, prompts):
    first = batch_generate(
        pair.model, pair.tokenizer, prompts, max_tokens=6,
        return_prompt_caches=True, return_token_ids=True,
    )  # fmt: skip
    more = pair.encode(" and then?")
    second = batch_generate(
        pair.model, pair.tokenizer, [more] * len(prompts), max_tokens=6,
        prompt_caches=first.caches, return_token_ids=True,
    )  # fmt: skip
    whole = [answer for answer in first.token_ids if len(answer) == 6]
    assert len(whole) > 3
    for prompt, answer, found in zip(prompts, first.token_ids, second.token_ids, strict=True):
        if answer in whole:  # the end of one that ended is in the cache too
            assert found == until_end(pair, uncached(pair.dense, prompt + answer + more, 6))


@pytest.mark.parametrize("arrivals", [(0, 2, 3, 5, 8, 9), (9, 0, 4, 4, 1, 2)])
def test_continuous_batching(pair, prompts, arrivals):
    """Sequences join after so many steps and leave, and each gets what it gets alone."""
    generator = CheckedBatchGenerator(
        pair.model,
        proposer=Proposer(pair.model, check=True),
        completion_batch_size=3,
        prefill_batch_size=2,
        stop_tokens=[[token] for token in pair.tokenizer.eos_token_ids],
    )
    found, of_uid, left = [[] for _ in prompts], {}, len(prompts)
    for step in range(500):
        for i, arrival in enumerate(arrivals):
            if arrival == step:
                (uid,) = generator.insert([prompts[i]], [TOKENS - i])
                of_uid[uid] = i
        for response in generator.next()[1]:
            if response.finish_reason != "stop":
                found[of_uid[response.uid]].append(response.token)
            left -= response.finish_reason is not None
        if not left:
            break
    generator.close()
    for i, tokens in enumerate(found):
        assert tokens == until_end(pair, uncached(pair.dense, prompts[i], TOKENS - i))
