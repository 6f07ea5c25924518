"""Several tokens a step, with the bits of single steps."""

import copy
import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as lm_caches
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from architecture_models import tiny_architecture
from mlx_flashhead.wide import twin
from mlx_flashhead.wide.positions import Positions
from mlx_flashhead.wide.step import WideSteps
from mlx_flashhead.wide.trial import established_costs
from mlx_flashhead.wide.twin import NoWideStepError
from tiny_models import tiny_model
from wide_checks import (
    FORMS,
    form_that_holds,
    held,
    of_a_batch,
    read,
    same_as_single,
    single_steps,
    wide_steps,
    widths_of,
)

ALL = [2, 3, 4, 8]


@pytest.mark.parametrize("width", [2, 5, 8])
def test_it_has_the_bits_of_single_steps(architecture, width):
    model, apart = architecture
    assert all(same_as_single(model, length, width, apart=apart) for length in (5, 37))


def test_layers_without_a_kernel_multiply_each_row(architecture, monkeypatch):
    model, apart = architecture
    monkeypatch.setattr(twin, "row_products", lambda x, layer: None)
    assert same_as_single(model, 5, 4, apart=apart)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("length", [5, 37])
def test_it_goes_back_to_each_position(architecture, length, evaluated):
    """A window of 8 tokens ends within the first step, or is past its end."""
    model, apart = architecture
    before, tokens = read(model, length)
    single = copy.deepcopy(before)
    for n in range(5):
        if n:
            single_steps(model, tokens[:, n - 1 : n], single)
        caches = copy.deepcopy(before)
        objects = list(caches)
        step = wide_steps(model, caches, apart=apart).feed(tokens[:, :4], caches)
        if evaluated:
            mx.eval(step.logits, [cache.state for cache in caches])
        step.back_to(n)
        assert all(cache is known for cache, known in zip(caches, objects, strict=True))
        assert held(caches) == held(single)
        after = copy.deepcopy(single)
        # The window's places are written again.
        following = tokens[:, n : n + 6]
        assert single_steps(model, following, caches) == single_steps(model, following, after)


CACHES = {
    "longer": (lambda: lm_caches.KVCache(), 254),
    "full": (lambda: lm_caches.KVCache(), 256),
    "8 bits": (lambda: lm_caches.QuantizedKVCache(group_size=32, bits=8), 254),
    "window": (lambda: lm_caches.RotatingKVCache(max_size=8), 5),
    "window, kept": (lambda: lm_caches.RotatingKVCache(max_size=9, keep=4), 6),
    "window past its end": (lambda: lm_caches.RotatingKVCache(max_size=8), 29),
    "window before its end": (lambda: lm_caches.RotatingKVCache(max_size=600), 255),
    "chunks": (lambda: lm_caches.ChunkedKVCache(chunk_size=512), 250),
    "batch": (lambda: lm_caches.BatchKVCache([0]), 254),
    "batch, padded": (lambda: lm_caches.BatchKVCache([3]), 6),
    "window of a batch": (lambda: lm_caches.BatchRotatingKVCache(8, [2]), 5),
    "window of a batch past its end": (lambda: lm_caches.BatchRotatingKVCache(8, [0]), 29),
    "window of a batch before its end": (lambda: lm_caches.BatchRotatingKVCache(600, [1]), 255),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches(model, name):
    make, length = CACHES[name]
    caches = [make() for _ in model.layers]
    assert same_as_single(model, length, 6, caches, apart=False)
    before, tokens = read(model, length, [make() for _ in model.layers])
    for n in range(6):
        single = copy.deepcopy(before)
        caches = copy.deepcopy(before)
        if n:
            single_steps(model, tokens[:, :n], single)
        wide_steps(model, caches, apart=False).feed(tokens[:, :6], caches).back_to(n)
        assert held(caches) == held(single)


@pytest.mark.parametrize("length", [5, 37])
def test_a_text_that_is_alone_in_a_batch(architecture, length):
    model, apart = architecture

    def new():
        return of_a_batch(lm_caches.make_prompt_cache(model))

    assert same_as_single(model, length, 4, new(), apart=apart)
    before, tokens = read(model, length, new())
    for n in range(3):
        single = copy.deepcopy(before)
        caches = copy.deepcopy(before)
        if n:
            single_steps(model, tokens[:, :n], single)
        wide_steps(model, caches, apart=apart).feed(tokens[:, :4], caches).back_to(n)
        assert held(caches) == held(single)
        following = tokens[:, n : n + 6]
        assert single_steps(model, following, caches) == single_steps(model, following, single)


@pytest.mark.parametrize("of_a_batch", [False, True])
def test_a_window_past_its_end_is_not_held(model, of_a_batch):
    """A step keeps what it writes over, and no window."""
    size = 5000
    if of_a_batch:
        caches = [lm_caches.BatchRotatingKVCache(size, [0])]
    else:
        caches = [lm_caches.RotatingKVCache(size)]
    (cache,), tokens = read(model, 5, caches)
    shape = (1, cache.keys.shape[1], size, cache.keys.shape[3])
    cache.keys = mx.random.normal(shape)
    cache.values = mx.random.normal(shape)
    cache.offset = mx.array([size]) if of_a_batch else size
    cache._offset = size
    single_steps(model, tokens[:, :3], caches)
    steps = wide_steps(model, caches, apart=False)
    steps.twin(apart=False)
    before = held(caches)
    memory = mx.get_active_memory()
    step = steps.feed(tokens[:, 4:8], caches)
    mx.eval(step.logits, [cache.state for cache in caches])
    assert mx.get_active_memory() - memory < cache.nbytes // 100
    step.back_to(0)
    assert held(caches) == before


@pytest.mark.parametrize("length", [250, 254, 256, 510])
def test_arrays_are_as_long_as_single_steps_make_them(model, length):
    caches, tokens = read(model, length)
    single = copy.deepcopy(caches)
    single_steps(model, tokens[:, :7], single)
    wide_steps(model, caches, apart=False).feed(tokens[:, :7], caches)
    shapes, expected = ([cache.keys.shape for cache in each] for each in (caches, single))
    assert shapes == expected


def test_a_chunk_that_forgets_its_beginning_is_read_singly(model):
    caches = [lm_caches.ChunkedKVCache(chunk_size=20) for _ in model.layers]
    steps = wide_steps(model, caches, apart=False)
    read(model, 14, caches)
    assert list(steps.costs(caches)) == [2, 3, 4, 5, 6]


@pytest.mark.newest
def test_a_rotation_by_the_length_of_the_text_is_each_positions():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = tiny_model(max_position_embeddings=16, rope_scaling=scaling)
    assert all(
        same_as_single(model, length, 4, apart=apart) for length in (14, 20) for apart in FORMS
    )


@pytest.mark.newest
def test_what_the_trial_did_not_see_changes_nothing():
    """Past 64 tokens this model looks at some of them alone."""
    model = tiny_architecture("deepseek_v32", tied=False)
    caches, tokens = read(model, 62)
    single = copy.deepcopy(caches)
    before = held(caches)
    steps = wide_steps(model, caches, apart=True)
    with pytest.raises(NoWideStepError, match="differ"):
        steps.feed(tokens[:, :4], caches)
    assert held(caches) == before
    assert steps.costs(caches) == {}
    assert single_steps(model, tokens, caches) == single_steps(model, tokens, single)


class OtherCache(lm_caches.KVCache):
    pass


def test_other_caches_have_single_steps(model):
    known = lm_caches.KVCache()
    padded = lm_caches.ArraysCache(2)
    padded.prepare(lengths=[1])
    several = lm_caches.BatchKVCache([0, 1])
    for other in (OtherCache(), lm_caches.CacheList(known, OtherCache()), padded, several):
        assert established_costs(WideSteps.of(model), [known, other]) == {}


def test_it_shares_the_models_arrays(model):
    mx.eval(model.parameters())
    classes = [type(module) for module in model.modules()]
    functions = dict(vars(llama)), dict(vars(llama.Attention))
    caches, tokens = read(model, 5)
    memory = mx.get_active_memory()
    steps = wide_steps(model, caches, apart=False)
    steps.feed(tokens[:, :3], caches).back_to(0)
    assert mx.get_active_memory() - memory < 10_000
    shared = dict(tree_flatten(steps.twin(apart=False).parameters()))
    assert all(shared[name] is array for name, array in tree_flatten(model.parameters()))
    assert [type(module) for module in model.modules()] == classes
    assert functions == (dict(vars(llama)), dict(vars(llama.Attention)))


def test_queries_and_results_are_read_where_they_lie():
    """A GPU's attention copies a query whose heads do not follow each other."""
    n_heads = 4
    n_positions = 3
    head_dim = 32
    given = []

    def attention(queries, keys, values, cache, scale, mask):
        given.append(queries)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)

    # A rotation leaves them so.
    queries = mx.random.normal((1, n_heads, n_positions, head_dim))
    each = Positions([mx.random.normal((1, 2, 7, head_dim))] * n_positions)
    attended = twin._attend(attention)(queries, each, each, cache=None, scale=0.1)
    mx.eval(given, attended)
    strides = [np.array(query, copy=False).strides for query in given]
    assert [heads for _, heads, _, _ in strides] == [4 * head_dim] * n_positions
    # A layer puts positions before heads, and joins the heads.
    assert np.array(attended.transpose(0, 2, 1, 3), copy=False).flags.c_contiguous


def _quantize(model, monkeypatch):
    nn.quantize(model, 32, 4)


def _weight(model, monkeypatch):
    layer = model.layers[0].mlp.up_proj
    layer.weight = layer.weight * 2


def _layer(model, monkeypatch):
    model.layers[0] = copy.deepcopy(model.layers[0])


def _adapter(model, monkeypatch):
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 20.0, "dropout": 0.0})


def _function(model, monkeypatch):
    attend = llama.scaled_dot_product_attention
    monkeypatch.setattr(llama, "scaled_dot_product_attention", lambda *a, **b: attend(*a, **b))


@pytest.mark.parametrize("change", [_quantize, _weight, _layer, _adapter, _function])
def test_a_model_that_changes_gets_another_twin(change, monkeypatch):
    model = tiny_model()
    steps = wide_steps(model, [lm_caches.KVCache()] * 2, apart=False)
    assert WideSteps.of(model) is steps
    change(model, monkeypatch)
    assert WideSteps.of(model) is not steps
    assert same_as_single(model, 6, 3, apart=False)


@pytest.mark.parametrize(
    "name, setting, value",
    [
        ("recurrent_gemma", "logits_soft_cap", 0.5),
        ("gear", "final_logit_softcapping", 0.5),
        ("minicpm", "scale_emb", 3),
        ("kimi_linear", "routed_scaling_factor", 0.1),
    ],
)
def test_a_setting_that_changes_holds_from_the_next_step_on(name, setting, value):
    """The model reads it at each call."""
    model = tiny_architecture(name, tied=False)
    form = form_that_holds(model, (6,), (3,))
    caches, tokens = read(model, 6)
    before = single_steps(model, tokens[:, :1], copy.deepcopy(caches))
    steps = wide_steps(model, caches, apart=form)
    setattr(model.args, setting, value)
    assert single_steps(model, tokens[:, :1], caches) != before
    assert same_as_single(model, 6, 3, apart=form)
    assert WideSteps.of(model) is steps


def test_what_is_known_of_a_model_leaves_with_it():
    model = tiny_model()
    twin = WideSteps.of(model).twin(apart=False)
    n_known = len(WideSteps.known)
    del model, twin
    assert len(WideSteps.known) == n_known - 1


def test_what_a_first_step_keeps_is_no_change():
    model = tiny_architecture("plamo3", tied=False)
    assert widths_of(model) == ALL
    steps = WideSteps.of(model)
    read(model, 5)
    assert WideSteps.of(model) is steps


def test_arrays_that_a_model_replaces_by_equal_ones_are_no_change():
    """It does so in each step. Others are seen before the next text."""
    model = tiny_architecture("gemma3n", tied=False)
    assert widths_of(model) == ALL
    steps = WideSteps.of(model)
    read(model, 5)
    assert steps.parts.are_of(model)
    assert WideSteps.of(model) is steps
    assert same_as_single(model, 6, 3, apart=False)
    part = model.model.language_model.layers[0].altup.correction_coefs
    part.weight = part.weight / 2
    assert WideSteps.of(model) is not steps
    assert same_as_single(model, 6, 3, apart=False)


def test_a_model_that_changes_itself_has_single_steps(caplog):
    """Nobody can tell then whether somebody else has changed it."""
    model = tiny_model()

    class Counts(type(model)):
        def __call__(self, *args, **named):
            self.n_calls = getattr(self, "n_calls", 1000) + 1
            return super().__call__(*args, **named)

    model.__class__ = Counts
    with caplog.at_level(logging.INFO):
        assert widths_of(model) == []
        read(model, 5)
        assert widths_of(model) == []
    assert caplog.messages == ["Steps of several tokens are off: this model's own steps change it."]
