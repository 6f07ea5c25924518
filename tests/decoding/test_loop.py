"""The loop for one text: the dense model's tokens, whatever is proposed."""

import importlib
from itertools import count

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from architecture_models import tiny_architecture
from flash_loops import N_TOKENS, PROMPT, flash_of, make_flash
from mlx_flashhead import make_sampler
from mlx_flashhead.common.masks import Mask
from mlx_flashhead.decoding import caches, loop
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.phase import REPLACED, TRAINED, UNKNOWN_CACHE, VERIFIED
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import PortableOperations
from mlx_flashhead.head.rounded_product import SlotProduct
from recorded_calls import recorded_calls
from tiny_models import tiny_model

SAMPLERS = {
    "greedy": {},
    "temperature": {"temp": 1.0},
    "top-p": {"temp": 0.8, "top_p": 0.95},
    "all": {"temp": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
}
ONLY = mx.array([token % 7 == 0 for token in range(203)])
PROCESSORS = {
    "penalty": lambda: sample_utils.make_logits_processors(repetition_penalty=1.3),
    "bias": lambda: sample_utils.make_logits_processors(logit_bias={5: 9.0, 40: -9.0}),
    "mask": lambda: [every_seventh()],
    "scale": lambda: [lambda _, logits: logits * 3.0],
}


def every_seventh():
    bits = np.packbits(np.pad(np.array(ONLY), (0, 21)), bitorder="little").view(np.uint32)
    return Mask(lambda tokens, vocab_size: bits)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n_probes", [1, pytest.param(3, marks=pytest.mark.compiled), 26])
def test_every_sampler(flash, name, n_probes, misses):
    assert len(flash.checked(SAMPLERS[name], n_probes=n_probes)) == N_TOKENS
    # XTC is dense.
    assert bool(misses) == (n_probes < 26 and name != "xtc")


@pytest.mark.parametrize("name", [*PROCESSORS, None])
@pytest.mark.parametrize("settings", [{}, {"temp": 0.9, "top_p": 0.9}], ids=["greedy", "top-p"])
def test_every_processor(flash, name, settings, misses, monkeypatch):
    """Without one, a thread computes the verification."""
    if name is None:
        monkeypatch.setattr("mlx_flashhead.head.rounded_product.WORTH_A_THREAD", 0)
    processors = None
    if name is not None:
        processors = PROCESSORS[name]()
    flash.checked(settings, logits_processors=processors)
    # The clusters of tokens that these change are scored, too: here nearly all. A scale is dense.
    assert misses or name in ("penalty", "bias", "scale")


def test_a_seed_is_that_of_the_text(flash):
    def tokens(seed=None, of_mlx=7):
        return flash.tokens(sampler=make_sampler(temp=1.0, seed=seed), seed=of_mlx)

    assert tokens(seed=3) == tokens(seed=3, of_mlx=99) != tokens(seed=4)
    assert tokens(of_mlx=1) != tokens(of_mlx=2)


WINDOW = {"sliding_window": 16, "sliding_window_pattern": 2, "num_hidden_layers": 2}
FORMS = [{"dtype": d, "bits": b} for d in (mx.float32, mx.bfloat16, mx.float16) for b in (None, 4)]
ARCHITECTURES = [
    {"arch": "gemma2", "final_logit_softcapping": 30.0},
    {"arch": "cohere", "logit_scale": 0.5},
    {"arch": "phi"},
    {"arch": "gemma3_text"} | WINDOW,
]


@pytest.mark.parametrize("options", FORMS + ARCHITECTURES, ids=str)
def test_every_format_and_architecture(options, misses):
    flash = make_flash(**options)
    for settings in ({}, {"temp": 1.0}, {"temp": 9.0, "top_p": 0.99}):
        flash.checked(settings, max_tokens=24)
    # The choices of this gemma2 are clear.
    assert misses or "gemma2" in options.values()


def test_logits_that_are_nan_or_depend_on_each_other_are_dense():
    flash = make_flash()
    flash.model.model.layers[0].mlp.down_proj.weight *= mx.nan
    flash.checked(max_tokens=5)
    model = tiny_model()

    class Normed(type(model)):
        def __call__(self, *arguments, **options):
            logits = super().__call__(*arguments, **options)
            return logits / mx.linalg.norm(logits, axis=-1, keepdims=True)

    model.__class__ = Normed
    flash_of(model).checked({"temp": 0.05, "seed": 1})


CACHES = {
    "plain": make_prompt_cache,
    "quantized": make_prompt_cache,
    "rotating": lambda model: [RotatingKVCache(max_size=12, keep=2) for _ in model.layers],
    "mixed": lambda model: [KVCache(), RotatingKVCache(max_size=12, keep=2)],
}
QUANTIZED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("stop", [1, 9, 40])
def test_every_cache_holds_the_confirmed_tokens(flash, name, stop):
    """The caller leaves after any token, and goes on as after the dense loop."""
    options = QUANTIZED if name == "quantized" else {}

    def run(dense):
        cache = CACHES[name](flash.model)
        steps = flash.steps(dense=dense, prompt_cache=cache, max_tokens=40, **options)
        tokens = [next(steps)[0] for _ in range(stop)]
        steps.close()
        held = [layer.offset for layer in cache]
        more = flash.steps(dense=True, prompt=[77], max_tokens=8, prompt_cache=cache, **options)
        return tokens, held, [token for token, _ in more]

    checked = run(False)
    dense = run(True)
    assert checked == dense
    assert checked[1] == [len(PROMPT) + stop] * 2


def test_state_space_layers_are_copied_and_replayed(misses):
    flash_of(tiny_architecture("mamba2", tied=True)).checked()
    assert misses


def test_log_probabilities_are_those_of_the_dense_logits(flash, misses):
    checked = flash.steps(max_tokens=20)
    dense = flash.steps(max_tokens=20, dense=True)
    for (token, found), (same, expected) in zip(checked, dense, strict=True):
        assert token == same
        assert mx.allclose(found, expected, atol=1e-4)
    assert misses


@pytest.mark.parametrize("call", [1, 2, 7, 20])
def test_a_processor_that_raises_leaves_confirmed_tokens(flash, call):
    calls = []

    def allowed(tokens, vocab_size):
        calls.append(len(tokens))
        if len(calls) == call:
            raise RuntimeError("boom")
        return None

    processor = Mask(allowed)
    dense = flash.tokens(dense=True)
    cache = make_prompt_cache(flash.model)
    tokens = []
    with pytest.raises(RuntimeError, match="boom"):
        for token, _ in flash.steps(prompt_cache=cache, logits_processors=[processor]):
            tokens.append(token)
    assert tokens == dense[: len(tokens)]
    if tokens:
        assert [layer.offset for layer in cache] == [len(PROMPT) + len(tokens)] * 2


class Evicting(KVCache):
    """Says as its parent that it can be trimmed, and is wrong then."""

    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys, values)
        n_kept = min(8, keys.shape[-2])
        return keys[..., -n_kept:, :], values[..., -n_kept:, :]

    def make_mask(self, *arguments, **options):
        return None


class Slotted:
    """A cache without a dictionary of attributes."""

    __slots__ = ("held",)

    def __init__(self):
        self.held = KVCache()

    def __getattr__(self, name):
        return getattr(self.held, name)


def patched():
    layer = KVCache()
    layer.update_and_fetch = layer.update_and_fetch
    return layer


UNKNOWN_CACHES = {
    "subclass": lambda: [Evicting(), Evicting()],
    "slots": lambda: [Slotted(), Slotted()],
    "tuple": lambda: (KVCache(), KVCache()),
    "function of its own": lambda: [patched(), KVCache()],
    "in a list": lambda: [CacheList(Evicting()), KVCache()],
}


@pytest.mark.parametrize("name", UNKNOWN_CACHES)
def test_text_with_unknown_caches_is_dense(flash, name):
    make = UNKNOWN_CACHES[name]
    if name == "in a list":
        assert not caches.are_known(make())
        return
    modes = []
    found = flash.tokens(prompt_cache=make(), announce=modes.append, max_tokens=30)
    plain = generate_step(mx.array(PROMPT), flash.model, prompt_cache=make(), max_tokens=30)
    assert found == [token for token, _ in plain]
    assert set(modes) == {UNKNOWN_CACHE}


def test_a_model_in_training_mode_is_dense():
    """Dropout draws in each step."""
    flash = make_flash(num_hidden_layers=2)
    modes = []
    expected = flash.tokens(announce=modes.append)
    assert VERIFIED in modes
    flash.model.train()
    modes.clear()
    assert flash.tokens(announce=modes.append) == expected
    assert all(mode.is_dense for mode in modes)


class DroppingOut(nn.Module):
    """A part of a model that is being trained, with a dropout before it."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.dropout = nn.Dropout(0.3)

    def __call__(self, x):
        return self.part(self.dropout(x))


def test_what_replaces_a_function_of_mlx_lm_is_called(monkeypatch):
    """mlx-lm's loop decodes the text, since it looks the function up."""
    flash = make_flash(num_hidden_layers=2)
    generate = importlib.import_module("mlx_lm.generate")
    # mlx-lm 0.31 looks the name up in the module of the caches.
    place = generate if hasattr(generate, "make_prompt_cache") else mlx_lm.models.cache
    made = []
    original = place.make_prompt_cache

    def make_prompt_cache(*arguments, **options):
        made.append(original(*arguments, **options))
        return made[-1]

    expected = [token for token, _ in generate_step(mx.array(PROMPT), flash.model, max_tokens=12)]
    monkeypatch.setattr(place, "make_prompt_cache", make_prompt_cache)
    modes = []
    assert flash.tokens(max_tokens=12, announce=modes.append) == expected
    assert len(made) == 1
    assert modes == 12 * [REPLACED]


@pytest.mark.parametrize("sampler", [None, sample_utils.make_sampler(temp=1.0)])
def test_a_model_in_training_with_dropout_is_mlx_lms_to_the_random_state(sampler):
    """mlx-lm's loop decodes it, since each of its calls draws."""
    flash = make_flash(num_hidden_layers=2)
    for layer in flash.model.layers:
        layer.mlp.up_proj = DroppingOut(layer.mlp.up_proj)
    flash.model.train()
    plain = generate_step(mx.array(PROMPT), flash.model, sampler=sampler, max_tokens=12)
    mx.random.seed(7)
    expected = [token for token, _ in plain], mx.random.state[0].tolist()
    modes = []
    tokens = flash.tokens(sampler=sampler, max_tokens=12, announce=modes.append)
    assert (tokens, mx.random.state[0].tolist()) == expected
    assert set(modes) == {TRAINED}
    texts = []
    for make in (BatchGenerator, VerifiedBatchGenerator):
        mx.random.seed(7)
        generator = make(flash.model)
        generator.insert([PROMPT, PROMPT[::-1]], [9, 9], samplers=[sampler] * 2)
        texts.append([])
        responses = generator.next_generated()
        while responses:
            texts[-1] += [(response.uid, response.token) for response in responses]
            responses = generator.next_generated()
        texts[-1].append(mx.random.state[0].tolist())
    assert texts[0] == texts[1]
    flash.model.eval()
    assert flash.tokens(sampler=sampler, max_tokens=12) != tokens


@pytest.fixture
def forward_passes(monkeypatch):
    """A list with an item for each call of the model in a loop."""
    calls = []
    monkeypatch.setattr(loop.compat, "maybe_quantize_kv_cache", lambda *arguments: calls.append(0))
    return calls


def test_the_first_tokens_do_not_wait(flash, forward_passes, monkeypatch):
    """The first token is as early as ever, then verifications come after 4, 8, 16 … tokens."""
    for name in ("max_risk", "max_wait"):
        monkeypatch.setattr(policy_of(flash.head), name, 1e9)
    steps = flash.steps(n_probes=26, max_tokens=40)
    seen = [len(forward_passes) for _, _ in zip(range(14), steps, strict=False)]
    steps.close()
    # The prompt is read first, and then a step ahead of each verification.
    assert seen == [3, *[8] * 4, *[16] * 8, 32]


def test_processes_that_share_a_model_take_the_same_steps(flash, forward_passes, monkeypatch):
    monkeypatch.setattr(policy_of(flash.head), "lockstep", True)
    steps = []
    for ready, seconds in ((True, 0.0), (False, 10.0)):
        monkeypatch.setattr(SlotProduct, "ready", ready)
        clock = count(step=seconds)
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(f"time.{name}", lambda clock=clock: next(clock))
        forward_passes.clear()
        steps.append((flash.tokens(), len(forward_passes)))
    assert steps[0] == steps[1]


@pytest.mark.compiled
def test_one_evaluation_a_token(flash, monkeypatch):
    """A token that the head has chosen is one command buffer: nothing else is launched, but for
    the verifications."""
    launched = recorded_calls(monkeypatch, mx, "async_eval")
    proposer = Proposer(flash.model, DecodingSettings(n_probes=26))
    prompt = mx.array(PROMPT, dtype=mx.uint32)
    tokens = list(verified_tokens(prompt, flash.model, proposer=proposer, max_tokens=40))
    mlx_lm_prefill = 1
    after_last = 1
    assert len(tokens) == 40 and proposer.n_verifications >= 3
    steps = len(launched) - proposer.n_verifications - mlx_lm_prefill
    assert steps == len(tokens) - 1 + after_last


def test_pending_tokens_are_joined_along_the_way(monkeypatch):
    """On kernels, so that a verification of 32 states joins no more than one does at once."""
    joins = recorded_calls(monkeypatch, FlashHead, "joined")
    monkeypatch.setattr(PortableOperations, "joined_early", MetalOperations.joined_early)
    # All clusters are probed, so that none is rejected.
    flash = make_flash(n_probes=13)
    policy = policy_of(flash.head)
    policy.first_pending = 32
    policy.max_pending = 32
    policy.max_risk = 1e9
    policy.max_wait = 1e9
    assert flash.tokens(max_tokens=36) == flash.tokens(max_tokens=36, dense=True)
    assert [len(proposals) for _, proposals, *_ in joins[:5]] == [7, 7, 7, 7, 8]
