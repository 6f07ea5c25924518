"""Guessed tokens change nothing but the time: texts beside plain mlx-lm's, whatever is guessed."""

import copy
import random
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from architecture_models import tiny_architecture
from flash_loops import OTHERS, PROMPT, flash_of
from mlx_flashhead import batch_generate, make_sampler
from mlx_flashhead.common.masks import Mask
from mlx_flashhead.decoding import decoder
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.drafting import drafted_steps
from mlx_flashhead.decoding.guessing import guesser
from mlx_flashhead.decoding.guessing.guesser import Worth
from mlx_flashhead.decoding.guessing.lookup import Lookup
from mlx_flashhead.decoding.loop import verified_steps
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.wide.step import Established, WideSteps, kind_of
from mlx_flashhead.wide.trial import established_costs
from mlx_flashhead.wide.twin import NoWideStepError
from tiny_models import tiny_model

N_TOKENS = 20
WINDOW = {"sliding_window": 12, "sliding_window_pattern": 2, "num_hidden_layers": 2}
MODELS = {
    "plain": partial(tiny_model, num_hidden_layers=2),
    "4 bits": partial(tiny_model, num_hidden_layers=2, bits=4, dtype=mx.bfloat16),
    "window": partial(tiny_model, "gemma3_text", **WINDOW),
    "states": partial(tiny_architecture, "lfm2", tied=True),
}
SAMPLERS = {
    "greedy": lambda: None,
    "noise": lambda: make_sampler(temp=0.9, top_p=0.9, seed=4),
    "mlx-lm's": lambda: sample_utils.make_sampler(temp=1.0, min_p=0.01),
}
# The keys of a batch's window have another order where a text was rolled back, and where another
# one has joined at another step.
ANOTHER_ORDER = 1e-3


def evens():
    """Allows even tokens."""
    return Mask(lambda tokens, vocab_size: [0x55555555] * -(-vocab_size // 32))


PROCESSORS = {
    "none": list,
    "penalties": lambda: sample_utils.make_logits_processors(
        {3: 2.0, 8: -1.0}, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1
    ),
    "mask": lambda: [evens()],
}


class Models(NamedTuple):
    """One model three times."""

    name: str
    plain: Any  # for mlx-lm's loops
    flash: Any  # with a FlashHead
    without: Any

    def functions(self, i):
        """A sampler's name and a processor's: three models have all pairs between them."""
        return tuple(SAMPLERS)[i], tuple(PROCESSORS)[self.other(i)]

    def other(self, i):
        """A second number of three, which three models pair with each first one."""
        return (i + tuple(MODELS).index(self.name)) % 3


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    plain = MODELS[request.param]()
    mx.eval(plain.parameters())
    flash = flash_of(copy.deepcopy(plain))
    flash.head.n_probes = 1
    policy = policy_of(flash.head)
    policy.max_risk = policy.max_wait = 1e9  # proposals run ahead
    return Models(request.param, plain, flash.model, copy.deepcopy(plain))


@pytest.fixture
def guessed(monkeypatch):
    """Makes lookups find the right tokens, with wrong ones among them: the numbers of a round."""
    chance = random.Random(5)
    counts = []
    established = guesser.established_costs

    def of_any_width(steps, layers):
        costs = established(steps, layers)
        return {width: costs[width] for width in [chance.choice([2, 4, 4, 8])] if width in costs}

    monkeypatch.setattr(guesser, "established_costs", of_any_width)

    def of(expected, right=0.6):
        def find(lookup, n):
            place = len(lookup.tokens) - len(PROMPT)
            found = [*expected[place : place + n], *[1] * n][:n]
            for i in range(n):
                if chance.random() > right:
                    found[i] = chance.randrange(200)
            return (4, found) if chance.random() < 0.8 else (0, [])

        monkeypatch.setattr(Lookup, "find", find)
        note = guesser.Guesser.note
        monkeypatch.setattr(
            guesser.Guesser,
            "note",
            lambda own, guess, n: (counts.append((len(guess.tokens), n)), note(own, guess, n))[1],
        )
        return counts

    return of


class Text(NamedTuple):
    """A text up to a place."""

    tokens: list[int]
    states: list[Any]  # MLX's random state after each token
    logprobs: list[float]  # of the tokens
    after: Any  # the logits (V,) that its cache gives for another token
    others: Any = ()  # the tokens of another text of a batch

    def assert_is(self, plain, atol=0.0):
        """Fails unless the text is plain mlx-lm's, its random states and its cache with it."""
        assert self.tokens == plain.tokens
        assert self.states == plain.states
        assert mx.allclose(mx.array(self.logprobs), mx.array(plain.logprobs), atol=2e-2)
        assert mx.allclose(self.after, plain.after, rtol=0, atol=atol)
        assert list(self.others) == list(plain.others)


def text_of(steps_of, model, functions, place=N_TOKENS, **options):
    mx.random.seed(3)
    cache = make_prompt_cache(model)
    steps = steps_of(
        mx.array(PROMPT),
        model,
        sampler=SAMPLERS[functions[0]](),
        logits_processors=PROCESSORS[functions[1]](),
        prompt_cache=cache,
        max_tokens=N_TOKENS,
        **options,
    )
    text = Text([], [], [], None)
    for token, logprobs in steps:
        _note(text, token, logprobs)
        if len(text.tokens) == place:
            break
    steps.close()
    return text._replace(after=model(mx.array([[77]]), cache=cache)[0, -1])


def batched_text_of(batch_of, model, functions, place=None, other=None):
    """The text in a batch, up to a place or to its end; another one may join it at its third."""
    mx.random.seed(3)
    generator = batch_of(model)
    options = {
        "samplers": [SAMPLERS[functions[0]]()],
        "logits_processors": [PROCESSORS[functions[1]]()],
    }
    (uid,) = generator.insert([PROMPT], [N_TOKENS], **options)
    text = Text([], [], [], None, [])
    while len(text.tokens) != place and (responses := generator.next_generated()):
        for response in responses:
            if response.uid != uid:
                text.others.append(response.token)
                continue
            _note(text, response.token, response.logprobs)
            cache = response.prompt_cache
            if len(text.tokens) == 3 and other is not None:
                generator.insert([other], [2])
    if cache is None:
        cache = generator.remove([uid], return_prompt_caches=True)[uid][0]
    generator.close()
    return text._replace(after=model(mx.array([[77]]), cache=cache)[0, -1])


def _note(text, token, logprobs):
    text.tokens.append(token)
    text.states.append(mx.random.state[0].tolist())
    text.logprobs.append(logprobs[token].item())


def ours(lookup="on", **settings):
    return lambda prompt, model, **options: verified_steps(
        prompt,
        model,
        proposer=Proposer(model, DecodingSettings(lookup=lookup, **settings)),
        **options,
    )


def our_batch(lookup="on", **settings):
    return lambda model: VerifiedBatchGenerator(
        model, proposer=Proposer(model, DecodingSettings(lookup=lookup, **settings))
    )


def plain_text_of(models, functions, *rest):
    """The text of mlx-lm's loop; that of a sampler of this package is this package's own."""
    if functions[0] == "noise":
        return text_of(ours("off", dense=True), models.without, functions, *rest)
    return text_of(generate_step, models.plain, functions, *rest)


def plain_batched_text_of(models, functions, *rest):
    if functions[0] == "noise":
        return batched_text_of(our_batch("off", dense=True), models.without, functions, *rest)
    return batched_text_of(BatchGenerator, models.plain, functions, *rest)


@pytest.mark.parametrize("i", range(3))
def test_texts_are_plain_mlx_lms(models, guessed, i):
    functions = models.functions(i)
    whole = plain_text_of(models, functions)
    part = plain_text_of(models, functions, 9)
    counts = guessed(whole.tokens)
    text_of(ours(), models.without, functions).assert_is(whole)
    assert sum(n for _, n in counts) > 4  # tokens that were right
    assert sum(k - n for k, n in counts) > 4  # and wrong
    text_of(ours(), models.flash, functions).assert_is(whole)
    text_of(ours(), models.flash, functions, 9).assert_is(part)


@pytest.mark.parametrize("i", range(3))
def test_a_text_that_decodes_alone_in_a_batch(models, guessed, i):
    functions = models.functions(i)
    whole = plain_batched_text_of(models, functions)
    counts = guessed(whole.tokens)
    batched_text_of(our_batch(), models.without, functions).assert_is(whole)
    assert sum(n for _, n in counts) > 4
    assert sum(k - n for k, n in counts) > 4
    plain = plain_batched_text_of(models, functions, 11)
    text = batched_text_of(our_batch(), models.flash, functions, 11)
    text.assert_is(plain, atol=ANOTHER_ORDER)


@pytest.mark.parametrize("i", range(3))
def test_a_batch_that_another_text_joins_and_leaves(models, guessed, i):
    """Its prompt is longer, so that the first text's cache is padded from then on."""
    functions = models.functions(i)
    whole = plain_batched_text_of(models, functions, None, OTHERS[1])
    counts = guessed(whole.tokens)
    for model in (models.without, models.flash):
        text = batched_text_of(our_batch(), model, functions, None, OTHERS[1])
        text.assert_is(whole, atol=ANOTHER_ORDER)
        assert sum(n for _, n in counts) > 2
    assert len(whole.others) == 2


@pytest.fixture(scope="module")
def draft():
    model = tiny_model("gemma3_text", seed=9, **WINDOW)
    return flash_of(model).model


@pytest.mark.parametrize("i", range(3))
def test_a_draft_model_changes_nothing(models, draft, i):
    """Beyond windows, too. What it drafts is mostly wrong here, or the target itself drafts."""
    _, _, flash, without = models
    sampler = tuple(SAMPLERS)[i]
    plain = plain_text_of(models, (sampler, "none"))
    target, drafting = ((flash, draft), (without, draft), (flash, without))[models.other(i)]
    mx.random.seed(3)
    cache = make_prompt_cache(target) + make_prompt_cache(drafting) if i else None
    proposer = Proposer(target)
    steps = drafted_steps(
        mx.array(PROMPT),
        target,
        drafting,
        proposer=proposer,
        num_draft_tokens=3,
        sampler=SAMPLERS[sampler](),
        prompt_cache=cache,
        max_tokens=N_TOKENS,
    )
    found = [(token, mx.random.state[0].tolist(), drafted) for token, _, drafted in steps]
    assert [each[:2] for each in found] == [*zip(plain.tokens, plain.states, strict=True)]
    n_drafted = sum(drafted for *_, drafted in found)
    assert n_drafted == proposer.n_guessed["draft model"]
    if drafting is without:  # the same model: all drafts are right
        assert n_drafted > N_TOKENS / 2 and proposer.n_steps < N_TOKENS * 0.6
    if cache is not None:
        held = cache[: len(target.layers)]
        assert mx.array_equal(target(mx.array([[77]]), cache=held)[0, -1], plain.after)


def test_a_model_may_have_layers_without_caches(draft):
    target = tiny_architecture("nemotron_h", tied=False)
    cache = make_prompt_cache(target)
    assert len(cache) < len(target.layers)
    plain = text_of(generate_step, target, ("greedy", "none"), 9)
    cache += make_prompt_cache(draft)
    prompt = mx.array(PROMPT)
    proposer = Proposer(target)
    steps = drafted_steps(
        prompt, target, draft, proposer=proposer, prompt_cache=cache, max_tokens=9
    )
    assert [token for token, *_ in steps] == plain.tokens and proposer.n_steps


@pytest.mark.parametrize("start", [0, 8, 30])
def test_a_drafted_text_that_is_closed_leaves_quantized_caches(draft, start):
    target = tiny_model(num_hidden_layers=2)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    plain = text_of(generate_step, target, ("greedy", "none"), 5, **options)
    cache = make_prompt_cache(target) + make_prompt_cache(draft)
    prompt = mx.array(PROMPT)
    options |= {"proposer": Proposer(target), "prompt_cache": cache}
    steps = drafted_steps(prompt, target, draft, **options)
    assert [next(steps)[0] for _ in range(5)] == plain.tokens
    steps.close()
    assert mx.array_equal(target(mx.array([[77]]), cache=cache[:2])[0, -1], plain.after)


def test_a_draft_models_cache_serves_the_next_turn(draft):
    target = flash_of(tiny_model(num_hidden_layers=2)).model
    drafting = tiny_model(num_hidden_layers=1, seed=4)
    cache = make_prompt_cache(target) + make_prompt_cache(drafting)
    held = list(PROMPT)
    for turn in ([], [5, 9, 77], [60]):
        prompt = held[-1:] + turn if turn else held
        steps = drafted_steps(
            mx.array(prompt),
            target,
            drafting,
            proposer=Proposer(target),
            prompt_cache=cache,
            context=held[:-1] if turn else [],
            max_tokens=9,
        )
        held += [*turn, *(token for token, *_ in steps)]
        lengths = {layer.offset for layer in cache}
        assert lengths == {len(held)}
        cache = [*map(trimmed, cache)]


def trimmed(layer):
    layer.trim(1)
    return layer


class OddHeads(type(tiny_model())):
    """A class of somebody else's, of whose steps nothing is known."""


def test_what_is_not_established(monkeypatch, caplog):
    model = tiny_model(num_hidden_layers=2)
    draft = tiny_model(num_hidden_layers=1)
    model.__class__ = OddHeads
    settings = DecodingSettings(lookup="on")
    with pytest.raises(ValueError, match="`lookup` is 'on', but a step of several tokens"):
        next(verified_steps(mx.array(PROMPT), model, proposer=Proposer(model, settings)))
    with pytest.raises(ValueError, match="`lookup` is 'on', but a step of several tokens"):
        batch_generate(model, SimpleNamespace(eos_token_ids=[]), [PROMPT, PROMPT], lookup="on")
    modes = []
    steps = drafted_steps(
        mx.array(PROMPT),
        model,
        draft,
        proposer=Proposer(model),
        max_tokens=5,
        announce=modes.append,
    )
    assert len(list(steps)) == 5
    assert "rounding may change" in modes[0]


def test_several_texts_take_single_steps_and_it_is_said_once(caplog):
    model = tiny_model(num_hidden_layers=2)
    tokenizer = SimpleNamespace(eos_token_ids=[], decode=str)
    decoder._log_once_that_steps_are_single.cache_clear()
    for _ in range(2):
        batch_generate(model, tokenizer, [PROMPT, *OTHERS], max_tokens=4, lookup="on")
    assert [r.message for r in caplog.records] == [
        "Several texts decode together, and nothing is looked up until one is alone."
    ]


@pytest.mark.parametrize("processors", PROCESSORS)
def test_a_step_that_the_model_does_not_take_is_a_single_one(guessed, monkeypatch, processors):
    model = tiny_model(num_hidden_layers=2)
    plain = text_of(generate_step, model, ("greedy", processors))
    counts = guessed(plain.tokens)
    feed = WideSteps.feed_by

    def at_some_places(steps, twin, tokens, caches):
        if tokens.shape[1] > 1 and caches[0].offset > 20:
            raise NoWideStepError
        return feed(steps, twin, tokens, caches)

    assert established_costs(WideSteps.of(model), make_prompt_cache(model))
    monkeypatch.setattr(WideSteps, "feed_by", at_some_places)
    text_of(ours(), model, ("greedy", processors)).assert_is(plain)
    assert len(counts) > 2


def test_guesses_that_do_not_pay_are_not_taken(monkeypatch):
    """As on a GPU: what is found decides, and what a step of several tokens costs."""
    monkeypatch.setattr(guesser, "gpu_is_default", lambda: True)
    model = tiny_model(num_hidden_layers=2)
    forever = sample_utils.make_logits_processors({5: 100.0})  # the text is this token alone
    n_steps = {}
    for cost in (1.01, 100.0):
        kind = kind_of(make_prompt_cache(model))
        WideSteps.of(model).established[kind] = Established({2: cost, 4: cost, 8: cost})
        proposer = Proposer(model)
        steps = verified_steps(
            mx.array(PROMPT),
            model,
            proposer=proposer,
            logits_processors=forever,
            max_tokens=60,
        )
        assert [token for token, _ in steps] == [5] * 60
        n_steps[cost] = proposer.n_steps
    assert n_steps[1.01] < 20
    assert n_steps[100.0] >= 59  # single ones


@pytest.mark.parametrize(
    "notes, costs, width",
    [
        ([(3, False)] * 5, {2: 1.05, 4: 1.3, 8: 2.0}, 8),
        ([(3, False)] * 5, {2: 1.05, 4: 1.3, 8: 5.0}, 4),
        ([(1, True)] * 9, {2: 1.05, 4: 1.3, 8: 2.5}, 4),
        ([(0, True)] * 9, {2: 1.05, 4: 1.3, 8: 2.5}, 1),
        ([(0, True)] * 20 + [(3, False)] * 3, {2: 1.05, 4: 1.3}, 4),
        ([(3, False)] * 5, {}, 1),
    ],
)
def test_the_width_of_a_step_is_the_one_that_pays(notes, costs, width):
    worth = Worth(0.5)
    for n_right, wrong in notes:
        worth.note(n_right, wrong)
    assert worth.best_width(costs, n_unknown=0) == width
