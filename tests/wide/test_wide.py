"""Several tokens a step, with the bits of single steps."""

import copy
import logging
import platform

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as lm_caches
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from architecture_models import quantized, tiny_architecture
from flash_loops import make_flash
from mlx_flashhead.common.machine import system
from mlx_flashhead.common.stored import stored as read_file
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.wide import stand_ins, store, trial, twin
from mlx_flashhead.wide.positions import Positions
from mlx_flashhead.wide.step import Established, WideSteps, layout_of
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
)

ALL = [2, 3, 4, 8]
# windows, a state, experts, lists of caches, an attention with a formula for one token
NAMES = {
    "llama": False,
    "qwen3_5": False,
    "gpt_oss": False,
    "falcon_h1": False,
    "deepseek_v3": True,
}


@pytest.fixture(scope="module", params=NAMES)
def architecture(request):
    return quantized(tiny_architecture(request.param, tied=False)), NAMES[request.param]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("width", [2, 5, 8])
def test_it_has_the_bits_of_single_steps(architecture, width):
    model, apart = architecture
    assert all(same_as_single(model, length, width, apart=apart) for length in (5, 37))


def test_layers_without_a_kernel_multiply_each_row(architecture, monkeypatch):
    model, apart = architecture
    monkeypatch.setattr(twin, "row_products", lambda x, layer: None)
    assert same_as_single(model, 5, 4, apart=apart)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("length", [5, 37])  # a window of 8 ends within the first step
def test_it_goes_back_to_each_position(architecture, length, evaluated):
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
        following = tokens[:, n : n + 6]  # the window's places are written again
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
    new = lambda: of_a_batch(lm_caches.make_prompt_cache(model))  # noqa: E731
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
    first = lm_caches.RotatingKVCache(size)
    caches = [lm_caches.BatchRotatingKVCache(size, [0]) if of_a_batch else first]
    (cache,), tokens = read(model, 5, caches)
    shape = 1, cache.keys.shape[1], size, cache.keys.shape[3]
    cache.keys, cache.values = mx.random.normal(shape), mx.random.normal(shape)
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
    n_heads, n_positions, head_dim = 4, 3, 32
    given = []

    def attention(queries, keys, values, cache, scale, mask):
        given.append(queries)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)

    # as a rotation leaves them
    queries = mx.random.normal((1, n_heads, n_positions, head_dim))
    each = Positions([mx.random.normal((1, 2, 7, head_dim))] * n_positions)
    attended = twin._attend(attention)(queries, each, each, cache=None, scale=0.1)
    mx.eval(given, attended)
    strides = [np.array(query, copy=False).strides for query in given]
    assert [heads for _, heads, _, _ in strides] == [4 * head_dim] * n_positions
    # a layer puts positions before heads, and joins the heads
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


# The trial.


def widths_of(model) -> list[int]:
    return list(established_costs(WideSteps.of(model), lm_caches.make_prompt_cache(model)))


def test_the_trial_finds_every_width(architecture):
    model, apart = architecture
    WideSteps.of(model).established.clear()
    assert widths_of(model) == ALL
    caches = lm_caches.make_prompt_cache(model)
    known = WideSteps.of(model).established[layout_of(caches)]
    assert known.apart == apart and list(known.costs) == ALL and min(known.costs.values()) > 0


def test_it_is_tried_once_for_caches_of_a_kind(model, monkeypatch):
    WideSteps.of(model).established.clear()
    assert widths_of(model) == ALL
    monkeypatch.setattr(twin, "product", None)
    assert widths_of(model) == ALL
    small = [lm_caches.QuantizedKVCache(group_size=32, bits=4) for _ in model.layers]
    assert established_costs(WideSteps.of(model), small) == {}


def windows(model, size=64):
    return [lm_caches.RotatingKVCache(size) for _ in model.layers]


def test_steps_are_timed_before_and_past_the_end_of_a_window(model):
    steps = WideSteps.of(model)
    caches = windows(model)
    established_costs(steps, caches)
    found = steps.established.pop(layout_of(caches))
    assert list(found.costs) == list(found.costs_past_end) == ALL
    assert found.costs != found.costs_past_end
    assert found.lengths == (1022, 5, 4094, 62)
    assert trial._lengths(windows(model, 8192)) == [1022, 5, 4094, 8197, 8190]


def test_the_heads_choices_are_timed(monkeypatch):
    """Proposals of one state, and of as many states as a step has tokens."""
    flash = make_flash().model
    rows = []

    def propose(head, hidden):
        rows.append(len(hidden))
        return own_propose(head, hidden)

    own_propose = FlashHead.propose
    monkeypatch.setattr(FlashHead, "propose", propose)
    found = established_costs(WideSteps.of(flash), lm_caches.make_prompt_cache(flash))
    assert list(found) == ALL
    singles = [1] * trial.SINGLE_STEPS * trial.ROUNDS
    assert rows == [*singles, *(width for width in ALL for _ in range(trial.ROUNDS))]


def test_costs_are_those_of_the_caches_state(model, monkeypatch):
    steps = WideSteps.of(model)
    caches = windows(model)
    kind = layout_of(caches)
    steps.established[kind] = Established({2: 1.1, 4: 1.3}, costs_past_end={2: 1.5, 4: 2.5})
    read(model, 61, caches)
    assert steps.costs(caches) == {2: 1.1, 4: 2.5}
    read(model, 9, caches)
    assert steps.costs(caches) == {2: 1.5, 4: 2.5}
    steps.established[kind] = Established({2: 1.1, 4: 1.3})
    assert steps.costs(caches) == {}


def test_what_memory_does_not_hold_is_not_offered(model, monkeypatch):
    """Past a window's end each position of a step has an array of its own for some time."""
    steps = WideSteps.of(model)
    caches = windows(model, 5000)
    steps.established[layout_of(caches)] = Established(
        {2: 1.1, 4: 1.3}, costs_past_end={2: 1, 4: 1}
    )
    read(model, 5005, caches)
    n_bytes = sum(cache.nbytes for cache in caches)
    for n_more, widths in [(1, []), (3, [2]), (5, [2, 4])]:
        limit = mx.get_active_memory() + n_more * n_bytes
        info = {"max_recommended_working_set_size": limit}
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        assert list(steps.costs(caches)) == widths


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A place where trials are stored, as outside of tests."""
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(tmp_path))
    monkeypatch.setattr(trial, "LONG", (60,))
    monkeypatch.setattr(trial, "is_busy", lambda: False)
    return tmp_path


def test_a_trial_is_stored(stored, monkeypatch):
    models = [tiny_model(), tiny_model(), tiny_model(seed=1)]
    caches = lm_caches.make_prompt_cache(models[0])
    found = established_costs(WideSteps.of(models[0]), caches)
    (place,) = stored.glob("speeds/*.json")
    tried = trial._tried
    calls = []
    monkeypatch.setattr(
        trial, "_tried", lambda *arguments: calls.append(arguments) or tried(*arguments)
    )
    again = WideSteps.of(models[1])
    assert established_costs(again, caches) == found and not calls
    established_costs(again, [lm_caches.BatchKVCache([0])])  # another kind
    established_costs(WideSteps.of(models[2]), caches)  # other weights
    assert len(calls) == 2
    monkeypatch.setattr(store, "__version__", "another")
    again.established.clear()
    assert list(established_costs(again, caches)) == ALL and len(calls) == 3
    place.write_text(place.read_text().replace('"8"', '"9"'))  # damaged
    again.established.clear()
    assert list(established_costs(again, caches)) == ALL and len(calls) == 4


def test_what_a_busy_machine_has_found_is_tried_again(stored, monkeypatch):
    caches = lm_caches.make_prompt_cache(tiny_model())
    busy = [True, True, False, False, False, False]
    monkeypatch.setattr(trial, "is_busy", lambda: busy.pop(0))
    n_tried = []
    tried = trial._tried
    monkeypatch.setattr(trial, "_tried", lambda *args: n_tried.append(1) or tried(*args))
    for n in (1, 1, 2, 2):  # while it is busy, again when it is not, and never more
        model = tiny_model()
        steps = WideSteps.of(model)
        steps.established.clear()
        established_costs(steps, caches)
        assert len(n_tried) == n
    (file,) = stored.glob("speeds/*.json")
    ((key, found),) = read_file(file, Established).items()
    assert f", {system()}, mlx " in key
    assert found.lengths == (60, 5)
    assert not found.busy


def test_a_version_of_macos_is_of_the_key(stored, monkeypatch):
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    assert ", macOS 26.1, mlx " in store.key_of("1 KVCache()")


def test_a_trial_is_announced(model, caplog):
    WideSteps.of(model).established.clear()
    with caplog.at_level(logging.INFO):
        widths_of(model)
        widths_of(model)
    assert caplog.messages == [
        "Steps of several tokens are compared with single ones and timed, with 1 KVCache()."
    ]


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


@pytest.mark.parametrize("error, is_stored", [(NoWideStepError, True), (RuntimeError, False)])
def test_trouble_of_the_device_is_not_stored(stored, monkeypatch, error, is_stored):
    def trouble(steps, twin, tokens, caches):
        raise error("trouble")

    monkeypatch.setattr(WideSteps, "feed_by", trouble)
    model = tiny_model()
    assert widths_of(model) == []
    assert bool([*stored.glob("speeds/*.json")]) == is_stored


def test_states_are_tried_where_the_flash_head_is_called():
    flash = make_flash()
    calls = []
    with flash.head.intercepted(
        lambda hidden: calls.append(hidden) or mx.zeros((*hidden.shape[:2], 1))
    ):
        assert widths_of(flash.model) == ALL
    assert not calls


def _reversed_rows(monkeypatch):
    product = twin.product
    monkeypatch.setattr(
        twin, "product", lambda layer, single, x: product(layer, single, x[:, ::-1])
    )


def _another_order(monkeypatch):
    """The products' sums begin at the other end."""

    def product(layer, single, x):
        return (x[..., ::-1, None] * layer.weight.T[::-1]).sum(axis=-2)

    monkeypatch.setattr(twin, "product", product)


def _keys_of_the_next(monkeypatch):
    monkeypatch.setattr(twin, "at", lambda value, j: value.parts[min(j + 1, len(value.parts) - 1)])


def _a_window_keeps_its_array(monkeypatch):
    """Each position finds what the last one has written."""
    positions = stand_ins.Positions

    def last(parts):
        parts = list(parts)
        return positions(parts[-1:] * len(parts))

    monkeypatch.setattr(stand_ins, "Positions", last)


@pytest.mark.parametrize(
    "mutation", [_reversed_rows, _another_order, _keys_of_the_next, _a_window_keeps_its_array]
)
def test_the_trial_finds_what_differs(mutation, monkeypatch, caplog):
    model = tiny_architecture("llama", tied=False)  # with a window
    mutation(monkeypatch)
    with caplog.at_level(logging.INFO):
        widths_of(model)
    (established,) = WideSteps.of(model).established.values()
    assert not established.costs or established.apart  # whose code is another
    assert "off" in caplog.text


def test_a_width_that_differs_is_off(monkeypatch, caplog):
    model = tiny_model()
    product = twin.product

    def some(layer, single, x):
        return product(layer, single, x) * (1 + 1e-6 * (x.shape[-2] == 4))

    monkeypatch.setattr(twin, "product", some)
    with caplog.at_level(logging.INFO):
        assert widths_of(model) == [2, 3, 8]
    assert "A step of 4 tokens is off" in caplog.text


def test_a_length_at_which_it_differs_turns_it_off(monkeypatch, caplog):
    model = tiny_model()
    attend = twin.at

    def other_beyond(value, j):
        keys = attend(value, j)
        return keys * (1 + 1e-6 * (keys.shape[2] > 1024))

    monkeypatch.setattr(twin, "at", other_beyond)
    with caplog.at_level(logging.INFO):
        widths_of(model)
    (established,) = WideSteps.of(model).established.values()
    assert established.apart
    assert "length 4094" in caplog.text


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_an_unquantized_model_has_single_steps_on_a_gpu(bits, on_gpu, monkeypatch):
    monkeypatch.setattr(trial, "gpu_is_default", lambda: on_gpu)
    assert bool(widths_of(tiny_model(bits=bits))) == (bits is not None or not on_gpu)
