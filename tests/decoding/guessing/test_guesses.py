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

from always_guessing import guess_always
from architecture_models import tiny_architecture
from flash_loops import OTHERS, PROMPT, flash_of
from mlx_flashhead import batch_generate, get_flash_head, make_sampler
from mlx_flashhead.common.masks import Mask
from mlx_flashhead.decoding import batch, decoder
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.drafting import drafted_tokens
from mlx_flashhead.decoding.guessing import guesses
from mlx_flashhead.decoding.guessing.guesser import Guesser, Offer
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.phase import MAY_DIFFER
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.wide import trial
from mlx_flashhead.wide.step import WideSteps
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

    def words(tokens, vocab_size):
        n_words = -(-vocab_size // 32)
        return [0x55555555] * n_words

    return Mask(words)


PROCESSORS = {
    "none": list,
    "penalties": partial(
        sample_utils.make_logits_processors,
        {3: 2.0, 8: -1.0},
        repetition_penalty=1.3,
        presence_penalty=0.2,
        frequency_penalty=0.1,
    ),
    "mask": lambda: [evens()],
}


class Models(NamedTuple):
    """One model three times: for mlx-lm's loops, with a FlashHead, and without."""

    name: str
    plain: Any
    flash: Any
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
    # Proposals run ahead.
    policy.max_risk = 1e9
    policy.max_wait = 1e9
    return Models(request.param, plain, flash.model, copy.deepcopy(plain))


@pytest.fixture(autouse=True)
def every_offer(monkeypatch):
    guess_always(monkeypatch)


class Oracle(Guesser):
    """Knows a text, and guesses it, mostly right.

    What it hears must be what the text's caches hold.

    Args:
        expected: The tokens of the text.
        prompt: Those before it.
    """

    name = "an oracle"
    wants_states = True

    def __init__(self, expected, prompt=PROMPT):
        self._expected = expected
        self._prompt = prompt
        self._chance = random.Random(5)
        # Of each guess these are its tokens, and those that were right.
        self.counts = []
        self.heard = []
        # The state (D,) after each token that was heard; None without a FlashHead.
        self.states = []
        self.n_left = 0

    def hear(self, tokens, states):
        self.heard += tokens
        if states is None:
            self.states += [None for _ in tokens]
        else:
            self.states += [*states]
        assert len(self.states) == len(self.heard)

    def take_back(self, n):
        assert 0 < n <= len(self.heard)
        del self.heard[-n:]
        del self.states[-n:]

    def offer(self, text, latest):
        assert self.heard == [*self._prompt, *text.fed]
        chance = self._chance
        n = chance.choice([1, 3, 3, 7])
        found = self._expected[text.n_chosen : text.n_chosen + n]
        # Past the text's end it guesses ones.
        while len(found) < n:
            found.append(1)
        for i in range(n):
            if chance.random() > 0.6:
                found[i] = chance.randrange(200)
        if chance.random() > 0.8:
            return None
        return Offer(self, [0.9] * n, lambda n: mx.array(found[:n], mx.uint32))

    def judge(self, n, n_right):
        self.counts.append((n, n_right))

    def leave(self):
        self.n_left += 1

    @property
    def n_right(self):
        return sum(n_right for _, n_right in self.counts)

    @property
    def n_wrong(self):
        return sum(n - n_right for n, n_right in self.counts)


@pytest.fixture
def batch_guesser(monkeypatch):
    """Has a text that decodes alone in a batch guessed by one of ours."""

    def guess_by(guesser):
        # This names ours in the place of none.
        def guesses_of(proposer, read, **options):
            return guesses.guesses_of(proposer, read, guesser, **options)

        monkeypatch.setattr(batch, "guesses_of", guesses_of)
        return guesser

    return guess_by


class Text(NamedTuple):
    """A text up to a place.

    Attributes:
        tokens: Its tokens.
        states: MLX's random state after each token.
        logprobs: The tokens' log-probabilities.
        after: The logits (V,) that its cache gives for another token.
        others: The tokens of another text of a batch.
    """

    tokens: list[int]
    states: list[Any]
    logprobs: list[float]
    after: Any
    others: Any = ()

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
    responses = generator.next_generated()
    while responses:
        for response in responses:
            if response.uid != uid:
                text.others.append(response.token)
                continue
            _note(text, response.token, response.logprobs)
            cache = response.prompt_cache
            if len(text.tokens) == 3 and other is not None:
                generator.insert([other], [2])
        if len(text.tokens) == place:
            break
        responses = generator.next_generated()
    if cache is None:
        cache = generator.remove([uid], return_prompt_caches=True)[uid][0]
    generator.close()
    return text._replace(after=model(mx.array([[77]]), cache=cache)[0, -1])


def _note(text, token, logprobs):
    text.tokens.append(token)
    text.states.append(mx.random.state[0].tolist())
    text.logprobs.append(logprobs[token].item())


def ours(lookup="auto", guesser=None, **settings):
    """A function that begins a text of our loop."""

    def steps_of(prompt, model, **options):
        proposer = Proposer(model, DecodingSettings(lookup=lookup, **settings))
        return verified_tokens(prompt, model, proposer=proposer, guesser=guesser, **options)

    return steps_of


def our_batch(lookup="auto", **settings):
    """A function that makes a batch of ours."""

    def batch_of(model):
        proposer = Proposer(model, DecodingSettings(lookup=lookup, **settings))
        return VerifiedBatchGenerator(model, proposer=proposer)

    return batch_of


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
def test_texts_are_plain_mlx_lms(models, i):
    functions = models.functions(i)
    whole = plain_text_of(models, functions)
    part = plain_text_of(models, functions, 9)
    oracle = Oracle(whole.tokens)
    text_of(ours(guesser=oracle), models.without, functions).assert_is(whole)
    assert oracle.n_right > 4 and oracle.n_wrong > 4
    text_of(ours(guesser=Oracle(whole.tokens)), models.flash, functions).assert_is(whole)
    text_of(ours(guesser=Oracle(whole.tokens)), models.flash, functions, 9).assert_is(part)


class SecondBest:
    """Takes the best token and the second one in turns: a call too many changes what follows."""

    def __init__(self):
        self.n_calls = 0

    def __call__(self, logprobs):
        self.n_calls += 1
        return mx.argsort(-logprobs, axis=-1)[..., self.n_calls % 2]


def test_a_text_of_an_unknown_sampler_is_not_guessed(models):
    """With a FlashHead or without: guesses would call the sampler for tokens that are wrong."""

    def run(steps_of, model, **options):
        sampler = SecondBest()
        steps = steps_of(mx.array(PROMPT), model, sampler=sampler, max_tokens=N_TOKENS, **options)
        return [int(token) for token, _ in steps], sampler.n_calls

    expected = run(generate_step, models.plain)
    for model in (models.flash, models.without):
        oracle = Oracle(expected[0])
        assert run(ours(guesser=oracle), model) == expected
        assert not oracle.counts


@pytest.mark.parametrize("i", range(3))
def test_whoever_guesses_hears_the_tokens_and_states_of_every_step(models, i):
    """At the text's end these are the tokens that were handed out."""
    functions = models.functions(i)
    plain = plain_text_of(models, functions, 13)
    oracle = Oracle(plain_text_of(models, functions).tokens)
    text_of(ours(guesser=oracle), models.flash, functions, 13).assert_is(plain)
    assert oracle.n_left == 1
    assert oracle.heard == [*PROMPT, *plain.tokens]
    head = get_flash_head(models.flash)
    noted = []

    def note(hidden):
        noted.append(hidden)
        return head.dense_logits(hidden)

    with head.intercepted(note):
        models.flash(mx.array(oracle.heard)[None])
    spacing = mx.finfo(noted[0].dtype).eps
    assert mx.allclose(mx.stack(oracle.states), noted[0][0], rtol=0, atol=spacing * 64)


@pytest.mark.parametrize("i", range(3))
def test_a_text_that_decodes_alone_in_a_batch(models, batch_guesser, i):
    functions = models.functions(i)
    whole = plain_batched_text_of(models, functions)
    plain = plain_batched_text_of(models, functions, 11)
    oracle = batch_guesser(Oracle(whole.tokens))
    batched_text_of(our_batch(), models.without, functions).assert_is(whole)
    assert oracle.n_right > 4 and oracle.n_wrong > 4
    batch_guesser(Oracle(whole.tokens))
    text = batched_text_of(our_batch(), models.flash, functions, 11)
    text.assert_is(plain, atol=ANOTHER_ORDER)


@pytest.mark.parametrize("i", range(3))
def test_a_batch_that_another_text_joins_and_leaves(models, batch_guesser, i):
    """Its prompt is longer, so that the first text's cache is padded from then on."""
    functions = models.functions(i)
    whole = plain_batched_text_of(models, functions, None, OTHERS[1])
    n_right = 0
    for model in (models.without, models.flash):
        oracle = batch_guesser(Oracle(whole.tokens))
        text = batched_text_of(our_batch(), model, functions, None, OTHERS[1])
        text.assert_is(whole, atol=ANOTHER_ORDER)
        n_right += oracle.n_right
    assert n_right > 2
    assert len(whole.others) == 2


@pytest.mark.parametrize("place, repeats, chunk", [(5, 1, 2048), (3, 6, 4)])
def test_several_texts_that_draw_are_not_guessed(monkeypatch, place, repeats, chunk):
    """The second one draws from MLX's random state while the first one goes on."""
    model = tiny_model(num_hidden_layers=2)
    make = SAMPLERS["mlx-lm's"]

    def texts_of(generator):
        mx.random.seed(3)
        (first,) = generator.insert([PROMPT], [N_TOKENS], samplers=[make()])
        found = {first: []}
        responses = generator.next_generated()
        while responses:
            for response in responses:
                found.setdefault(response.uid, []).append(response.token)
                if response.uid == first and len(found[first]) == place:
                    generator.insert([[1, 2, 3, 4] * repeats], [4], samplers=[make()])
            responses = generator.next_generated()
        return list(found.values())

    plain = texts_of(BatchGenerator(model, prefill_step_size=chunk))
    guessers = [Oracle(plain[0])]

    def of_the_first(proposer, read, **options):
        guesser = guessers.pop() if guessers else None
        return guesses.guesses_of(proposer, read, guesser, **options)

    monkeypatch.setattr(batch, "guesses_of", of_the_first)
    proposer = Proposer(model, DecodingSettings(lookup="on"))
    generator = VerifiedBatchGenerator(model, proposer=proposer, prefill_step_size=chunk)
    assert texts_of(generator) == plain
    assert not guessers and proposer.n_guessed


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
    pairs = [(flash, draft), (without, without), (flash, without)]
    target, drafting = pairs[models.other(i)]
    mx.random.seed(3)
    cache = None
    if i > 0:
        cache = make_prompt_cache(target) + make_prompt_cache(drafting)
    proposer = Proposer(target)
    steps = drafted_tokens(
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
    # All drafts are right.
    if drafting is target:
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
    steps = drafted_tokens(
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
    steps = drafted_tokens(prompt, target, draft, **options)
    assert [next(steps)[0] for _ in range(5)] == plain.tokens
    steps.close()
    assert mx.array_equal(target(mx.array([[77]]), cache=cache[:2])[0, -1], plain.after)


@pytest.mark.newest
@pytest.mark.parametrize("drafted", [False, True])
def test_a_kept_cache_whose_chunk_is_full_takes_single_steps(drafted):
    """Wide steps of Llama 4 are established, but not from a chunk's end on."""
    model = tiny_architecture("llama4", tied=False, attention_chunk_size=16)
    draft = tiny_model(num_hidden_layers=1)
    prompt = mx.array([*PROMPT, *PROMPT, 8, 9])
    plain = make_prompt_cache(model)
    ours = make_prompt_cache(model) + make_prompt_cache(draft)
    for cache in (plain, ours[: len(plain)]):
        list(generate_step(prompt, model, prompt_cache=cache, max_tokens=2))
    expected = generate_step(mx.array([7]), model, prompt_cache=plain, max_tokens=9)
    proposer = Proposer(model, DecodingSettings(lookup="on"))
    options = {"proposer": proposer, "max_tokens": 9}
    if drafted:
        steps = drafted_tokens(mx.array([7]), model, draft, prompt_cache=ours, **options)
    else:
        steps = verified_tokens(mx.array([7]), model, prompt_cache=ours[: len(plain)], **options)
    assert [token for token, *_ in steps] == [token for token, _ in expected]


class OddHeads(type(tiny_model())):
    """A class of somebody else's, of whose steps nothing is known."""


def test_what_is_not_established(monkeypatch, caplog):
    model = tiny_model(num_hidden_layers=2)
    draft = tiny_model(num_hidden_layers=1)
    model.__class__ = OddHeads
    settings = DecodingSettings(lookup="on")
    with pytest.raises(ValueError, match="`lookup` is 'on', but a step of several tokens"):
        next(verified_tokens(mx.array(PROMPT), model, proposer=Proposer(model, settings)))
    with pytest.raises(ValueError, match="`lookup` is 'on', but a step of several tokens"):
        batch_generate(model, SimpleNamespace(eos_token_ids=[]), [PROMPT, PROMPT], lookup="on")
    modes = []
    steps = drafted_tokens(
        mx.array(PROMPT),
        model,
        draft,
        proposer=Proposer(model),
        max_tokens=5,
        announce=modes.append,
    )
    assert len(list(steps)) == 5
    assert modes[0] == MAY_DIFFER


@pytest.fixture
def trials(monkeypatch):
    """How many tokens of a text were there at each trial of wide steps."""
    n_tokens = []
    tokens = []
    tried = trial._tried

    def noted(*arguments):
        n_tokens.append(len(tokens))
        return tried(*arguments)

    monkeypatch.setattr(trial, "_tried", noted)
    return n_tokens, tokens


@pytest.mark.parametrize(
    "options, n_trials",
    [
        ({"max_kv_size": 16}, 1),
        # Here "on" asks before the text.
        ({"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}, 2),
        ({"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": len(PROMPT) + 9}, 1),
    ],
)
def test_steps_are_tried_before_a_text_alone(trials, options, n_trials):
    """Also those with the caches that it has later on; else it has single steps then."""
    model = tiny_model(num_hidden_layers=2)
    proposer = Proposer(model, DecodingSettings(lookup="on"))
    n_tokens, tokens = trials
    for token, _ in verified_tokens(
        mx.array(PROMPT), model, proposer=proposer, max_tokens=30, **options
    ):
        tokens.append(token)
    plain = generate_step(mx.array(PROMPT), model, max_tokens=30, **options)
    assert tokens == [token for token, _ in plain]
    assert n_tokens == [0] * n_trials


@pytest.mark.parametrize(
    "prompts, limits, n_trials", [([PROMPT], [20], 1), ([PROMPT, OTHERS[0]], [20, 3], 0)]
)
def test_steps_are_tried_before_a_text_of_a_batch(trials, monkeypatch, prompts, limits, n_trials):
    """A text that another one leaves alone has single steps, if nothing is known of others."""
    monkeypatch.setattr(guesses, "gpu_is_default", lambda: True)
    model = tiny_model(num_hidden_layers=2)
    n_tokens, tokens = trials
    generator = our_batch("auto")(model)
    generator.insert(prompts, limits)
    responses = generator.next_generated()
    while responses:
        tokens += [response.token for response in responses]
        responses = generator.next_generated()
    assert n_tokens == [0] * n_trials


def test_several_texts_take_single_steps_and_it_is_said_once(caplog):
    model = tiny_model(num_hidden_layers=2)
    tokenizer = SimpleNamespace(eos_token_ids=[], decode=str)
    decoder._log_once_that_steps_are_single.cache_clear()
    for _ in range(2):
        batch_generate(model, tokenizer, [PROMPT, *OTHERS], max_tokens=4, lookup="on")
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["Several texts decode together, and nothing is looked up until one is alone."]


@pytest.mark.parametrize("processors", PROCESSORS)
def test_a_step_that_the_model_does_not_take_is_a_single_one(monkeypatch, processors):
    model = tiny_model(num_hidden_layers=2)
    plain = text_of(generate_step, model, ("greedy", processors))
    feed = WideSteps.feed_by

    def at_some_places(steps, twin, tokens, caches):
        if tokens.shape[1] > 1 and caches[0].offset > 20:
            raise NoWideStepError
        return feed(steps, twin, tokens, caches)

    assert established_costs(WideSteps.of(model), make_prompt_cache(model))
    monkeypatch.setattr(WideSteps, "feed_by", at_some_places)
    oracle = Oracle(plain.tokens)
    text_of(ours(guesser=oracle), model, ("greedy", processors)).assert_is(plain)
    assert len(oracle.counts) > 2
