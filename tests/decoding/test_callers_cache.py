"""What a caller may rely on between two tokens: caches, draws and processors are what plain
mlx-lm's loop would have left, whatever was computed ahead."""

import copy
import threading
from functools import partial

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from architecture_models import tiny_architecture
from flash_loops import PROMPT, flash_of, make_flash
from mlx_flashhead.decoding import caches, loop
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.text import Text
from tiny_models import tiny_model

N_TOKENS = 24
PROBE = mx.array([[77]])
WINDOW = {"sliding_window": 12, "sliding_window_pattern": 2, "num_hidden_layers": 2}


def rotating(model):
    return [KVCache(), RotatingKVCache(max_size=12)]


def joined(model):
    return [ConcatenateKVCache(), ConcatenateKVCache()]


# How to make a model, and its caches.
KINDS = {
    "plain": (partial(tiny_model, num_hidden_layers=2), make_prompt_cache),
    "rotating": (partial(tiny_model, num_hidden_layers=2), rotating),
    "joined": (partial(tiny_model, num_hidden_layers=2), joined),
    "window": (partial(tiny_model, "gemma3_text", **WINDOW), make_prompt_cache),
    "states": (partial(tiny_architecture, "mamba2", tied=True), make_prompt_cache),
    "both": (partial(tiny_architecture, "lfm2", tied=True), make_prompt_cache),
    "lists": (partial(tiny_architecture, "falcon_h1", tied=True), make_prompt_cache),
}


class Pair:
    """A model with a FlashHead, and the same one for plain mlx-lm."""

    def __init__(self, kind):
        make, self.make_cache = KINDS[kind]
        self.dense = make()
        mx.eval(self.dense.parameters())
        self.flash = flash_of(copy.deepcopy(self.dense))

    def plain(self, prompt=PROMPT, **options):
        return generate_step(mx.array(prompt), self.dense, **options)

    def ours(self, prompt=PROMPT, **options):
        return self.flash.steps(prompt=prompt, **({"max_tokens": 256} | options))

    def both(self):
        """Each loop with its model."""
        return (self.plain, self.dense), (self.ours, self.flash.model)


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    return Pair(request.param)


@pytest.fixture(scope="module")
def plain_pair():
    return Pair("plain")


def logits_after(model, cache):
    """The logits of a probe after a cache, which stays as it is."""
    return model(PROBE, cache=copy.deepcopy(cache))[0, -1]


def closed(steps, cache, path):
    steps.close()
    return cache


def failed(steps, cache, path):
    with pytest.raises(KeyError):
        steps.throw(KeyError("a caller's"))
    return cache


def kept(steps, cache, path):
    return cache


def saved(steps, cache, path):
    steps.close()
    save_prompt_cache(str(path), cache)
    return load_prompt_cache(str(path))


ENDS = {"close": closed, "exception": failed, "kept": kept, "saved": saved}


@pytest.mark.parametrize("n_before, end", [*enumerate(ENDS)])
def test_a_text_that_ends_anywhere_leaves_its_cache_right(pair, n_before, end, tmp_path, misses):
    # Each way to end has other places.
    for place in range(1 + 3 * n_before, N_TOKENS, 13):
        found = []
        for steps_of, model in pair.both():
            cache = pair.make_cache(model)
            steps = steps_of(prompt_cache=cache)
            tokens = [next(steps)[0] for _ in range(place)]
            held = ENDS[end](steps, cache, tmp_path / "cache.safetensors")
            logits = mx.zeros(1)
            if end != "kept":
                logits = logits_after(model, held)
            # The next turn has the same caches, while the loop may live on.
            more = [
                token for token, _ in steps_of(prompt=[77, 5], prompt_cache=cache, max_tokens=4)
            ]
            found.append((tokens, more, logits))
        (tokens, more, expected), (ours, our_more, logits) = found
        assert (ours, our_more) == (tokens, more), place
        assert mx.allclose(logits, expected, atol=1e-3), place
    assert misses


def looked_at(model, cache):
    logits_after(model, cache)


def called(model, cache):
    mx.eval(model(PROBE, cache=cache))


def trimmed(model, cache):
    trim_prompt_cache(cache, 2)


def scaled(model, cache):
    cache[0].values = cache[0].values * 0.7


def quantized(model, cache):
    cache[:] = [layer.to_quantized(group_size=32, bits=8) for layer in cache]


USES = [(looked_at, (14,)), (called, (6,)), (trimmed, (11,)), (scaled, (9, 12)), (quantized, (8,))]


@pytest.mark.parametrize("use, places", USES)
def test_a_text_goes_on_after_its_cache_was_used(plain_pair, use, places, misses):
    """Changed between two tokens, the caches count as they would in mlx-lm's loop."""
    pair = plain_pair
    for place in places:
        found = []
        for steps_of, model in pair.both():
            cache = pair.make_cache(model)
            steps = steps_of(prompt_cache=cache, max_tokens=N_TOKENS)
            tokens = [next(steps)[0] for _ in range(place)]
            use(model, cache)
            found.append(tokens + [token for token, _ in steps])
        assert found[0] == found[1], place


# Draws.


SAMPLERS = [{"temp": 1.0}, {"temp": 0.8, "top_p": 0.9}, {"temp": 1.1, "min_p": 0.05}]


def texts_in_turns(steps_of, settings, between):
    """Two sampled texts that take turns, and what the caller draws between their tokens."""
    mx.random.seed(11)
    samplers = [sample_utils.make_sampler(**settings) for _ in range(2)]
    loops = [steps_of(sampler=sampler, max_tokens=N_TOKENS) for sampler in samplers]
    numbers = []
    tokens = [[], []]
    for i in range(N_TOKENS):
        for steps, own in zip(loops, tokens, strict=True):
            own.append(next(steps)[0])
            numbers += between(i)
    return tokens, numbers, mx.random.state[0].tolist()


def nothing(i):
    return []


def draws_sometimes(i):
    if i % 5 == 2:
        return [mx.random.uniform().item()]
    return []


def seeds_once(i):
    if i == 9:
        mx.random.seed(5)
    return []


@pytest.mark.parametrize(
    "settings, between", [*zip(SAMPLERS, [nothing, draws_sometimes, seeds_once], strict=True)]
)
def test_two_sampled_texts_take_turns(plain_pair, settings, between):
    found = [texts_in_turns(steps_of, settings, between) for steps_of, _ in plain_pair.both()]
    assert found[0] == found[1]


@pytest.mark.parametrize("between", [nothing, draws_sometimes, seeds_once])
def test_a_caller_draws_between_two_tokens(plain_pair, between, misses):
    found = []
    for steps_of, _ in plain_pair.both():
        mx.random.seed(3)
        numbers = []
        tokens = []
        sampler = sample_utils.make_sampler(temp=1.0)
        for i, (token, _) in enumerate(steps_of(sampler=sampler, max_tokens=N_TOKENS)):
            tokens.append(token)
            numbers += between(i)
            state = mx.random.state[0].tolist()
            numbers.append(state)
        found.append((tokens, numbers))
    assert found[0] == found[1]
    assert misses


def test_no_noise_is_used_twice(plain_pair, monkeypatch):
    """The keys of the draws that decide a text are all different, whatever is drawn again."""
    keys = set()
    mx.random.seed(4)
    steps = plain_pair.ours(sampler=sample_utils.make_sampler(temp=1.0), max_tokens=40)
    for _ in steps:
        keys.add(tuple(mx.random.state[0].tolist()))
    assert len(keys) == 40


# Processors.


def test_processors_get_mlx_lms_tokens_and_logits(plain_pair):
    """Their dtypes, too: a difference of two tokens must not wrap."""
    found = []
    for steps_of, _ in plain_pair.both():
        seen = []

        def processor(tokens, logits, seen=seen):
            seen.append((tokens.tolist(), tokens.dtype, logits.shape, logits.dtype))
            distance = mx.abs(tokens[-1] - mx.arange(logits.shape[-1]))
            return logits - 0.01 * distance

        steps = steps_of(logits_processors=[processor], max_tokens=12)
        found.append(([token for token, _ in steps], seen))
    assert found[0] == found[1]
    _, seen = found[0]
    dtypes = [dtype for _, dtype, _, _ in seen[:3]]
    assert dtypes == [mx.int32, mx.int64, mx.int64]


@pytest.mark.parametrize("n_before", [0, 1])
def test_a_list_of_processors_may_be_changed(plain_pair, n_before, misses):
    found = []
    for steps_of, _ in plain_pair.both():
        processors = sample_utils.make_logits_processors(repetition_penalty=1.3)[:n_before]
        processors = list(processors)
        tokens = []
        for i, (token, _) in enumerate(steps_of(logits_processors=processors, max_tokens=24)):
            tokens.append(token)
            if i == 7:
                processors += sample_utils.make_logits_processors(logit_bias={5: 9.0})
            if i == 15:
                processors.clear()
        found.append(tokens)
    assert found[0] == found[1]
    # With a penalty all clusters of this model are scored.
    assert misses or n_before


def test_a_processor_may_be_replaced(plain_pair, misses):
    found = []
    for steps_of, _ in plain_pair.both():
        processors = sample_utils.make_logits_processors(logit_bias={7: 0.5})
        tokens = []
        for i, (token, _) in enumerate(steps_of(logits_processors=processors, max_tokens=24)):
            tokens.append(token)
            if i == 7:
                processors[:] = sample_utils.make_logits_processors(logit_bias={5: 9.0})
        found.append(tokens)
    assert found[0] == found[1] and 5 in found[0]
    assert misses


def test_attributes_of_others_objects_say_nothing(plain_pair):
    class Processor:
        begin = "a text"
        for_text = 3
        __code__ = []  # noqa: RUF012

        def __init__(self):
            self.n_calls = 0

        def __call__(self, tokens, logits):
            self.n_calls += 1
            return logits * (1 + self.n_calls % 3)

    found = []
    for steps_of, _ in plain_pair.both():
        processor = Processor()
        steps = steps_of(
            logits_processors=[processor],
            sampler=sample_utils.make_sampler(temp=0.9),
            max_tokens=12,
        )
        mx.random.seed(2)
        found.append(([token for token, _ in steps], processor.n_calls))
    assert found[0] == found[1]


# Threads, and mlx-lm itself.


def test_mlx_lm_is_as_it_was_while_a_text_is_generated(plain_pair):
    module = loop.compat.module
    before = dict(vars(module))
    classes = {name: dict(vars(value)) for name, value in before.items() if isinstance(value, type)}
    for _ in plain_pair.ours(max_tokens=5):
        assert dict(vars(module)) == before
        for name, held in classes.items():
            assert dict(vars(getattr(module, name))) == held


def test_threads_generate_at_once(misses):
    """Several with one model and with others, singly and in batches, and plain mlx-lm between."""
    pairs = [Pair("plain"), Pair("window")]
    expected = [[token for token, _ in pair.plain(max_tokens=30)] for pair in pairs]
    found = {}

    def generate(name, steps_of, options):
        try:
            found[name] = [token for token, _ in steps_of(max_tokens=30, **options)]
        except Exception as error:
            found[name] = error

    def in_batches(name, pair):
        try:
            texts, _ = pair.flash.batch([PROMPT, PROMPT[:3]], max_tokens=30)
            found[name] = texts[0]
        except Exception as error:
            found[name] = error

    threads = []
    for i, pair in enumerate(pairs):
        for n in range(2):
            threads.append(threading.Thread(target=generate, args=((i, n), pair.ours, {})))
        threads.append(threading.Thread(target=generate, args=((i, "plain"), pair.plain, {})))
        threads.append(threading.Thread(target=in_batches, args=((i, "batch"), pair)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (i, name), tokens in found.items():
        assert tokens == expected[i], (i, name)
    assert len(found) == 8
    assert misses
    assert mlx_lm.generate.__module__ == "mlx_lm.generate"


def test_a_model_that_was_used_by_many_is_dense_elsewhere():
    flash = make_flash(num_hidden_layers=2)
    tokens = flash.tokens(max_tokens=8)
    assert flash.model(mx.array([PROMPT])).shape == (1, len(PROMPT), 203)
    assert flash.tokens(max_tokens=8) == tokens


@pytest.mark.parametrize("kind", ["plain", "window", "states"])
def test_snapshots_are_held_where_a_rejection_is_possible(kind, monkeypatch):
    """One for each verification, two while one waits; of what is trimmed they hold no array."""
    pair = Pair(kind)
    taken = []
    most = 0
    of_layers = caches.copied_layers

    def copied(layers, *given):
        copies = of_layers(layers, *given)
        taken.append(copies)
        return copies

    monkeypatch.setattr(caches, "copied_layers", copied)
    for _ in pair.ours(dense=True, prompt_cache=pair.make_cache(pair.flash.model), max_tokens=8):
        pass
    assert not taken
    proposer = Proposer(pair.flash.model)
    texts = []
    enter = Text.enter

    def noting(own, *of_phase):
        texts.append(own)
        enter(own, *of_phase)

    monkeypatch.setattr(Text, "enter", noting)
    steps = pair.ours(
        proposer=proposer, prompt_cache=pair.make_cache(pair.flash.model), max_tokens=N_TOKENS
    )
    for _ in steps:
        most = max(most, len(texts[0].marks))
    assert proposer.n_verifications and most <= 2
    assert len(taken) <= proposer.n_verifications + 1
    held = [copy for copies in taken for copy in copies if copy is not None]
    assert bool(held) == (kind != "plain")
