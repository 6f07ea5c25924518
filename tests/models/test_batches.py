"""Batches: at once, continuously, with caches, and above ``max_positions``."""

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_flashhead import batch_generate
from mlx_flashhead.models.compat.generate import BatchGenerator
from model_pair import uncached

PROMPTS = ("One day", "How do I bake bread?", "x", "Why is the sky blue", "It was", "The river")
TOKENS = 12


@pytest.fixture
def prompts(pair):
    return [pair.encode(prompt) for prompt in PROMPTS]


def until_end(pair, tokens):
    """Without the end of the text and what was made after it."""
    ends = [i for i, token in enumerate(tokens) if token in pair.tokenizer.eos_token_ids]
    return tokens[: ends[0]] if ends else tokens


def batch_tokens(pair, model, prompts, **options):
    response = batch_generate(
        model, pair.tokenizer, prompts, max_tokens=TOKENS, return_token_ids=True, **options
    )
    return response.token_ids


@pytest.mark.parametrize("sizes", [{}, {"completion_batch_size": 2, "prefill_batch_size": 2}])
def test_batch_is_what_each_gets_alone(pair, prompts, sizes):
    expected = [until_end(pair, uncached(pair.model, ids, TOKENS)) for ids in prompts]
    assert batch_tokens(pair, pair.model, prompts, **sizes) == expected
    assert batch_tokens(pair, pair.model, prompts[::-1], **sizes) == expected[::-1]


def test_batch_with_every_probe_is_dense(pair, exact, prompts):
    expected = [until_end(pair, uncached(pair.dense, ids, TOKENS)) for ids in prompts]
    assert batch_tokens(pair, pair.dense, prompts) == expected
    assert batch_tokens(pair, pair.model, prompts) == expected


@pytest.mark.parametrize("max_positions", [5, 6])
def test_more_sequences_than_max_positions_are_dense(pair, head, max_positions):
    prompts = [pair.encode(f"{letter} is the") for letter in "ABCDEF"]  # of one length: together
    head.max_positions = max_positions
    reference = pair.dense if max_positions < len(prompts) else pair.model
    generator = BatchGenerator(pair.model, prefill_batch_size=6)  # no text ends before the others
    uids = generator.insert(prompts, [TOKENS] * 6)
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    assert [found[uid] for uid in uids] == [uncached(reference, ids, TOKENS) for ids in prompts]


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
            assert found == until_end(pair, uncached(pair.model, prompt + answer + more, 6))


def continuous(pair, model, prompts, *, arrivals, **options):
    """Tokens by prompt, where prompt i comes in after ``arrivals[i]`` steps."""
    generator = BatchGenerator(
        model, stop_tokens=[[t] for t in pair.tokenizer.eos_token_ids], completion_batch_size=3,
        prefill_batch_size=2, **options,
    )  # fmt: skip
    found, place, waiting = [[] for _ in prompts], {}, list(range(len(prompts)))
    step = 0
    while waiting or len(place) < len(prompts) or not all(done for _, done in place.values()):
        for i in [i for i in waiting if arrivals[i] <= step]:
            (uid,) = generator.insert([prompts[i]], [TOKENS - i])
            place[uid] = (i, False)
            waiting.remove(i)
        for response in generator.next_generated() if place else ():
            i, _ = place[response.uid]
            if response.finish_reason != "stop":
                found[i].append(response.token)
            if response.finish_reason is not None:
                place[response.uid] = (i, True)
        step += 1
    generator.close()
    return found


@pytest.mark.parametrize("n_probes", ["few", "every"])
@pytest.mark.parametrize("arrivals", [(0, 0, 0, 0, 0, 0), (0, 2, 3, 5, 8, 9), (9, 0, 4, 4, 1, 2)])
def test_continuous_batching(pair, head, prompts, n_probes, arrivals):
    """Sequences join and leave, and each gets what it gets alone."""
    head.n_probes = head.n_clusters if n_probes == "every" else head.n_probes
    reference = pair.dense if n_probes == "every" else pair.model
    found = continuous(pair, pair.model, prompts, arrivals=arrivals)
    for i, tokens in enumerate(found):
        assert tokens == until_end(pair, uncached(reference, prompts[i], TOKENS - i))


def test_sequences_with_samplers_of_their_own(pair, prompts):
    """A greedy sequence beside one that is sampled and one that is forced."""
    mx.random.seed(0)
    generator = BatchGenerator(pair.model, max_tokens=TOKENS)
    greedy, drawn, forced = generator.insert(
        prompts[:3],
        samplers=[None, make_sampler(temp=1.5, top_k=8), None],
        logits_processors=[[], [], make_logits_processors(logit_bias={7: 1e6})],
    )
    found = {uid: [] for uid in (greedy, drawn, forced)}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    assert found[greedy] == uncached(pair.model, prompts[0], TOKENS)
    assert found[forced] == [7] * TOKENS
    assert len(found[drawn]) == TOKENS
    assert found[drawn] != uncached(pair.model, prompts[1], TOKENS)
