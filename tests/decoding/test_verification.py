"""When tokens are verified, how many steps that wastes, and what a failure leaves behind."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from flash_loops import OTHERS, PROMPT, make_flash
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.decoder import Decoder
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.decoding.text import PendingToken
from mlx_flashhead.decoding.verification import VerifySchedule
from recorded_calls import recorded_calls


@pytest.fixture
def flash():
    """A model whose verifications come by numbers of tokens alone."""
    flash = make_flash(num_hidden_layers=2)
    policy = policy_of(flash.head)
    policy.max_risk = 1e9
    policy.max_wait = 1e9
    return flash


@pytest.fixture
def rounds(monkeypatch):
    """A list with an item for each round."""
    return recorded_calls(monkeypatch, Decoder, "round")


def test_a_token_that_ends_the_text_is_verified_at_once(flash, rounds):
    """Before any other step: a client that stops there has waited for none of no use."""
    expected = flash.tokens(dense=True, max_tokens=12)
    end = expected[9]
    place = expected.index(end)
    policy_of(flash.head).first_pending = 32
    rounds.clear()
    flash.head.eos_token_ids = (end,)
    steps = flash.steps(n_probes=26)
    tokens = [next(steps)[0] for _ in range(place + 1)]
    steps.close()
    assert tokens == expected[: place + 1]
    assert len(rounds) == place + 1


def test_a_limit_is_verified_at_once(flash, rounds):
    policy_of(flash.head).first_pending = 32
    assert len(flash.tokens(n_probes=26, max_tokens=11)) == 11
    assert len(rounds) == 11


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, *OTHERS[:2]]], ids=["one", "three"])
def test_the_risk_of_each_text_counts_by_itself(flash, monkeypatch, prompts):
    """A rejection loses tokens of its own text only."""
    counts = []
    launch = VerifySchedule._launch

    def launched(schedule, texts):
        counts.extend(text.n_read for text in texts)
        launch(schedule, texts)

    def read(pending, token):
        pending.token = token
        pending.is_read = True
        pending.risk = 0.01

    monkeypatch.setattr(VerifySchedule, "_launch", launched)
    monkeypatch.setattr(PendingToken, "read", read)
    policy = policy_of(flash.head)
    policy.first_pending = 32
    policy.max_risk = 0.035
    # No token is rejected.
    flash.head.n_probes = flash.head.n_clusters
    flash.batch(prompts, max_tokens=18)
    of_two_verifications = [4] * (2 * len(prompts))
    assert counts[: len(of_two_verifications)] == of_two_verifications


def test_steps_after_a_rejected_token_are_counted(flash, rounds, misses):
    """A rejection wastes the steps behind the token, and no more: a verification is read a step
    after its launch."""
    policy = policy_of(flash.head)
    policy.first_pending = 4
    policy.max_pending = 4
    n = len(flash.tokens(max_tokens=40))
    # A rejection wastes its step, those of the other three, and the one beside the product.
    most = 5 * len(misses)
    assert n < len(rounds) <= n + most


def test_a_failed_step_rolls_back(flash, monkeypatch, misses):
    """The caches hold what was handed out, of whatever layers the step had fed."""
    expected = flash.tokens(dense=True, max_tokens=30)
    layer = flash.model.model.layers[1]
    for call in (3, 9, 14):
        cache = make_prompt_cache(flash.model)
        n_calls = []
        original = type(layer).__call__

        def failing(self, *arguments, n_calls=n_calls, call=call, original=original, **options):
            n_calls.append(0)
            if self is flash.model.model.layers[1] and len(n_calls) > 2 * call:
                raise MemoryError("no room")
            return original(self, *arguments, **options)

        tokens = []
        with monkeypatch.context() as patch:
            steps = flash.steps(prompt_cache=cache, max_tokens=30)
            tokens.append(next(steps)[0])
            patch.setattr(type(layer), "__call__", failing)
            with pytest.raises(MemoryError):
                for token, _ in steps:
                    tokens.append(token)
        assert tokens == expected[: len(tokens)]
        assert {layer.offset for layer in cache} == {len(PROMPT) + len(tokens)}
        more = flash.steps(prompt=tokens[-1:], prompt_cache=trimmed(cache), max_tokens=8)
        assert [token for token, _ in more] == expected[len(tokens) :][:8]


def trimmed(cache):
    for layer in cache:
        layer.trim(1)
    return cache


def test_a_failed_insertion_leaves_the_batch_as_it_was(flash):
    expected = flash.batch([PROMPT, *OTHERS], dense=True)[0]
    generator = VerifiedBatchGenerator(flash.model, logprobs=False)
    uids = generator.insert([PROMPT], [25])
    tokens = {uid: [] for uid in range(4)}

    def take(n):
        for _ in range(n):
            for response in generator.next()[1]:
                tokens[response.uid].append(response.token)

    take(5)
    with pytest.raises(ValueError, match="empty prompt"):
        generator.insert([OTHERS[0], []], [25, 25])
    with pytest.raises(ValueError, match="one entry per segment: expected 2, got 1"):
        generator.insert(OTHERS[:2], [25])
    with pytest.raises(ValueError, match="must be above 0"):
        generator.insert([OTHERS[0]], [0])
    take(3)
    uids += generator.insert(OTHERS, [25] * 3)
    assert uids == [0, 1, 2, 3]
    take(400)
    assert [tokens[uid] for uid in uids] == expected


# Batches, as mlx-lm has them.


def plain(flash, prompts, limits, **options):
    """The tokens of mlx-lm's own batch, by uid, with the calls of ``next`` that gave them."""
    return decoded(BatchGenerator(flash.model), prompts, limits, **options)


def decoded(generator, prompts, limits, **options):
    """The tokens of each text of a batch, of which a call gives one at most."""
    uids = generator.insert(prompts, limits, **options)
    tokens = {uid: [] for uid in uids}
    while tokens and len(uids):
        responses = generator.next()[1]
        counts = [response.uid for response in responses]
        assert len(counts) == len(set(counts))
        for response in responses:
            tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                uids.remove(response.uid)
    generator.close()
    return list(tokens.values())


def test_a_call_gives_one_token_of_a_text_at_most_and_computes_none_that_is_left(flash, rounds):
    expected = plain(flash, [PROMPT, *OTHERS], [20] * 4)
    generator = VerifiedBatchGenerator(
        flash.model, proposer=Proposer(flash.model, DecodingSettings(n_probes=26))
    )
    rounds.clear()
    calls = []
    step = generator.next

    def noted():
        calls.append(len(rounds))
        return step()

    generator.next = noted
    with generator.stats() as stats:
        assert decoded(generator, [PROMPT, *OTHERS], [20] * 4) == expected
    # Between some calls nothing was computed.
    assert len(calls) > len(set(calls)) > 3
    assert stats.generation_tokens == 80


def test_an_empty_list_of_processors_is_none(flash, misses):
    default = sample_utils.make_logits_processors(logit_bias={5: 9.0})
    options = {"logits_processors": [[], default], "samplers": [None, make_sampler()]}
    found = []
    for cls in (BatchGenerator, VerifiedBatchGenerator):
        generator = cls(flash.model, logits_processors=default)
        found.append(decoded(generator, [PROMPT, OTHERS[0]], [15, 15], **options))
    assert found[0] == found[1]


def test_processors_in_batches_get_int32(flash):
    found = []
    for cls in (BatchGenerator, VerifiedBatchGenerator):
        seen = []

        def processor(tokens, logits, seen=seen):
            seen.append((tokens.tolist(), tokens.dtype, logits.shape, logits.dtype))
            return logits - 0.01 * mx.abs(tokens[-1] - mx.arange(logits.shape[-1]))

        options = {"logits_processors": [[processor], []]}
        texts = decoded(cls(flash.model), [PROMPT, OTHERS[1]], [8, 8], **options)
        found.append((texts, seen))
    assert found[0] == found[1]
    assert {dtype for _, dtype, _, _ in found[0][1]} == {mx.int32}


def test_a_wrapped_model_is_dense(flash):
    """Whatever is around a model may look at anything: nothing is known of its text."""

    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model
            self.layers = model.layers

        def __call__(self, tokens, cache=None):
            logits = self.inner(tokens, cache=cache)
            late = cache is not None and cache[0].offset % 3 == 0
            if late:
                return logits[..., ::-1]
            return logits

    around = Around(flash.model)
    assert not Proposer(around).verifies and Proposer(flash.model).verifies
    prompt = mx.array(PROMPT)
    expected = [token for token, _ in generate_step(prompt, around, max_tokens=20)]
    steps = verified_tokens(prompt, around, proposer=Proposer(around), max_tokens=20)
    assert [token for token, _ in steps] == expected
