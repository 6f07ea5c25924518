"""The trial of wide steps: what it finds, when it runs, and what is stored of it."""

import logging
import platform

import mlx.core as mx
import pytest
from mlx_lm.models import cache as lm_caches

from architecture_models import tiny_architecture
from flash_loops import make_flash
from mlx_flashhead.common.machine import system
from mlx_flashhead.common.stored import stored as read_file
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.wide import stand_ins, store, trial, twin
from mlx_flashhead.wide.step import Established, WideSteps, layout_of
from mlx_flashhead.wide.trial import established_costs
from mlx_flashhead.wide.twin import NoWideStepError
from recorded_calls import recorded_calls
from tiny_models import tiny_model
from wide_checks import read, widths_of

ALL = [2, 3, 4, 8]


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
    calls = recorded_calls(monkeypatch, trial, "_tried")
    again = WideSteps.of(models[1])
    assert established_costs(again, caches) == found and not calls
    another_kind = [lm_caches.BatchKVCache([0])]
    established_costs(again, another_kind)
    with_other_weights = WideSteps.of(models[2])
    established_costs(with_other_weights, caches)
    assert len(calls) == 2
    monkeypatch.setattr(store, "__version__", "another")
    again.established.clear()
    assert list(established_costs(again, caches)) == ALL and len(calls) == 3
    damaged = place.read_text().replace('"8"', '"9"')
    place.write_text(damaged)
    again.established.clear()
    assert list(established_costs(again, caches)) == ALL and len(calls) == 4


def test_what_a_busy_machine_has_found_is_tried_again(stored, monkeypatch):
    caches = lm_caches.make_prompt_cache(tiny_model())
    busy = [True, True, False, False, False, False]
    monkeypatch.setattr(trial, "is_busy", lambda: busy.pop(0))
    calls = recorded_calls(monkeypatch, trial, "_tried")
    # It is tried while the machine is busy, again when it is not, and never more.
    for n_tried in (1, 1, 2, 2):
        model = tiny_model()
        steps = WideSteps.of(model)
        steps.established.clear()
        established_costs(steps, caches)
        assert len(calls) == n_tried
    (file,) = stored.glob("speeds/*.json")
    ((key, found),) = read_file(file, Established).items()
    assert f", {system()}, mlx " in key
    assert found.lengths == (60, 5)
    assert not found.busy


def test_a_version_of_macos_is_of_the_key(stored, monkeypatch):
    version = ("26.1", ("", "", ""), "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: version)
    assert ", macOS 26.1, mlx " in store.key_of("1 KVCache()")


def test_a_trial_is_announced(model, caplog):
    WideSteps.of(model).established.clear()
    with caplog.at_level(logging.INFO):
        widths_of(model)
        widths_of(model)
    assert caplog.messages == [
        "Steps of several tokens are compared with single ones and timed, with 1 KVCache()."
    ]


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

    def note(hidden):
        calls.append(hidden)
        return mx.zeros((*hidden.shape[:2], 1))

    with flash.head.intercepted(note):
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
    # This architecture has a window.
    model = tiny_architecture("llama", tied=False)
    mutation(monkeypatch)
    with caplog.at_level(logging.INFO):
        widths_of(model)
    (established,) = WideSteps.of(model).established.values()
    # The code of steps that take positions apart is another.
    assert not established.costs or established.apart
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
    widths = widths_of(tiny_model(bits=bits))
    if bits is None and on_gpu:
        assert not widths
    else:
        assert widths
