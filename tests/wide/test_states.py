"""States without values of each position are made again after a step, and read no weight."""

import copy
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

import architectures as script
from architecture_models import quantized, tiny_architecture
from mlx_flashhead.wide import states, trial, twin
from mlx_flashhead.wide.step import WideSteps
from wide_checks import held, of_a_batch, read, single_steps, wide_steps

STEPS = script.recorded_steps()
WIDTHS = (2, 3, 4, 8)
# Arrays of several axes that scale or shift, and multiply nothing as a matrix does.
NO_MATRICES = ("A_log", "dt_bias", "x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")
NAMES = {
    *("baichuan_m1", "bailing_moe_linear", "bailing_moe_v3", "falcon_h1", "gear"),
    *("granitemoehybrid", "jamba", "kimi_k3", "kimi_linear", "lfm2", "lfm2_moe"),
    *("longcat_flash_ngram", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "plamo2"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma", "rwkv7"),
}


def test_every_architecture_with_such_states_is_tried():
    for name, cell in STEPS.items():
        source = Path(find_spec(f"mlx_lm.models.{name}").origin).read_text(encoding="utf-8")
        assert "ArraysCache" not in source or name in NAMES or cell == "no"


def _without_weights(path, array):
    """NaN, or another number, in the place of all weights."""
    if array.ndim < 2 or path.split(".")[-1] in NO_MATRICES:
        return array
    if mx.issubdtype(array.dtype, mx.floating):
        return mx.full(array.shape, float("nan"), dtype=array.dtype)
    return mx.full(array.shape, 7, dtype=array.dtype)


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_they_are_made_again_without_a_weight(name, of_batch, monkeypatch):
    """From each position of a step on, with NaN in the place of all weights."""
    model = tiny_architecture(name, tied=False)
    if sorted(NAMES).index(name) % 2:
        model = quantized(model)
    new = make_prompt_cache(model)
    if of_batch:
        new = of_a_batch(new)
    before, tokens = read(model, 13, new)
    single = copy.deepcopy(before)
    expected = [held(single)]
    for j in range(WIDTHS[-1]):
        single_steps(model, tokens[:, j : j + 1], single)
        expected.append(held(single))
    product = twin.product
    n_products = Counter()

    def counted(layer, *arguments):
        n_products[id(layer)] += 1
        return product(layer, *arguments)

    monkeypatch.setattr(twin, "product", counted)
    apart = STEPS[name] == "apart"
    weights = WideSteps.of(model).twin(apart=apart).parameters()
    for width in WIDTHS:
        caches = copy.deepcopy(before)
        steps = wide_steps(model, caches, apart=apart)
        step = steps.feed(tokens[:, :width], caches)
        mx.eval(step.logits, [cache.state for cache in caches])
        n_before = Counter(n_products)
        assert n_before
        steps.twin(apart=apart).update(tree_map_with_path(_without_weights, weights))
        for n in range(width - 1, -1, -1):
            step.back_to(n)
            assert held(caches) == expected[n]
        steps.twin(apart=apart).update(weights)
        assert n_products == n_before


def _widths_and_log(model, caplog):
    with caplog.at_level("INFO"):
        costs = trial.established_costs(WideSteps.of(model), make_prompt_cache(model))
    return list(costs), caplog.text


def test_a_state_that_is_made_otherwise_turns_wide_steps_off(monkeypatch, caplog):
    """What is right after the whole step is tried after each position of it, too."""
    model = tiny_architecture("lfm2", tied=False)
    first = states.first_positions
    monkeypatch.setattr(
        states, "first_positions", lambda value, n, whole: first(value, max(n, 2), whole)
    )
    assert _widths_and_log(model, caplog) == ([], caplog.text)
    assert "it differs from single steps" in caplog.text


def test_a_state_that_the_model_itself_writes_turns_wide_steps_off(monkeypatch, caplog):
    model = tiny_architecture("lfm2", tied=False)
    cls = type(model)

    class Writes(cls):
        def __call__(self, inputs, cache=None):
            result = super().__call__(inputs, cache=cache)
            state = next(each for each in cache if isinstance(each, ArraysCache))
            state[0] = state[0] + 0
            return result

    model.__class__ = Writes
    assert _widths_and_log(model, caplog) == ([], caplog.text)
    assert "A state is written by no layer that gets it." in caplog.text
