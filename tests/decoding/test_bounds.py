"""Bounds of rounding: whatever lies within them, no text differs."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import sample_utils

from architecture_models import tiny_architecture
from emulated_mlx_lm import emulated
from flash_loops import flash_of, make_flash
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.head import rounded_product
from mlx_flashhead.head.margins import TF32
from mlx_flashhead.head.rounded_product import SlotProduct
from mlx_flashhead.head.verdict import Verdict
from recorded_calls import recorded_calls
from tf32 import in_tf32
from tiny_models import tiny_model

PROCESSORS = {
    "none": {},
    "bias": {"logit_bias": {5: 1000.0, 40: -1000.0, 7: 998.5}},
    **{f"penalty {p}": {"repetition_penalty": p} for p in (0.05, 1.3)},
    "additive": {"presence_penalty": 1.5, "frequency_penalty": -0.7},
}
SAMPLERS = {
    "greedy": {},
    "draw": {"temp": 1.0, "seed": 1},
    "top-p": {"temp": 0.8, "top_p": 0.9, "top_k": 40, "seed": 2},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05, "seed": 3},
}
FORMATS = {"float32": {}, "bfloat16, 4 bits": {"dtype": mx.bfloat16, "bits": 4}}


@pytest.fixture(scope="module", params=FORMATS)
def model(request):
    return make_flash(num_hidden_layers=2, **FORMATS[request.param])


@pytest.fixture
def faults(monkeypatch):
    """Products of several states that lie off by as much as their bounds allow."""
    injected = []
    result = SlotProduct.result
    screen = Verdict._screen

    def wrong(product):
        slots = result(product)
        # It is being measured.
        if not hasattr(product, "tolerance"):
            return slots
        injected.append(product)
        signs = mx.random.randint(0, 2, slots.shape, key=mx.random.key(len(injected))) * 2 - 1
        exact = slots.astype(mx.float32)
        tolerance = product.tolerance
        off = tolerance.product[:, None, None] + tolerance.relative / 2 * mx.abs(exact)
        return (exact + 0.99 * signs * off).astype(slots.dtype)

    def with_tolerance(verdict):
        hidden = verdict._proposal.hidden
        verdict._product.tolerance = verdict._rounding.tolerance(hidden, verdict._operations)
        screen(verdict)

    monkeypatch.setattr(SlotProduct, "result", wrong)
    monkeypatch.setattr(Verdict, "_screen", with_tolerance)
    return injected


@pytest.mark.parametrize(
    "sampler, processors",
    [
        *((sampler, processors) for sampler in ("greedy", "top-p") for processors in PROCESSORS),
        *(("draw", "none"), ("draw", "bias"), ("xtc", "none"), ("xtc", "additive")),
    ],
)
def test_faults_within_the_bounds_change_no_text(model, faults, processors, sampler):
    functions = sample_utils.make_logits_processors(**PROCESSORS[processors])
    model.checked(SAMPLERS[sampler], logits_processors=functions, max_tokens=14)
    assert faults or sampler == "xtc"


@pytest.fixture
def judged(monkeypatch):
    """Whether each verified proposal was certain without the logits of its own state."""
    flags = []
    in_doubt = Verdict.in_doubt

    def noting(verdict):
        doubts = in_doubt(verdict)
        flags.extend(not doubt for doubt in doubts)
        return doubts

    monkeypatch.setattr(Verdict, "in_doubt", noting)
    return flags


@pytest.mark.parametrize("sampler", ["greedy", "top-p"])
def test_a_head_that_cancels_large_terms(sampler, judged):
    """Its logits are small, and the rounding of their sums is not: no fault is needed."""
    model = tiny_model(num_hidden_layers=2, tied=False)
    weights = dict(tree_flatten(model.parameters()))
    # Two coordinates of a state are always equal.
    for name, array in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "model.norm.weight")):
            array[1] = array[0]
        elif name.endswith("embed_tokens.weight"):
            array[:, 1] = array[:, 0]
    large = mx.random.normal((model.args.vocab_size,), key=mx.random.key(1)) * 3e4
    weights["lm_head.weight"][:, 0] += large
    weights["lm_head.weight"][:, 1] -= large
    model.load_weights(list(weights.items()))
    flash = flash_of(model)
    for seed in range(3):
        settings = dict(SAMPLERS[sampler])
        if sampler != "greedy":
            settings["seed"] = seed
        flash.checked(settings, prompt=[17 * seed, 5, 10, 15, 20, 25], max_tokens=40)
    assert len(judged) > 100 and not all(judged)


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_doubts_are_few_with_a_penalty(judged, penalty):
    """Scored logits are exact, so that rounding leaves few positions in doubt in bfloat16."""
    flash = make_flash(num_hidden_layers=2, dtype=mx.bfloat16)
    processors = sample_utils.make_logits_processors(repetition_penalty=penalty)
    flash.tokens(logits_processors=processors, n_probes=20)
    assert len(judged) > 20 and sum(judged) > 0.7 * len(judged)


def test_no_text_differs_where_products_are_made_in_tf32(monkeypatch):
    """With a bound that is measured on a few states of which none shows the error."""
    flash = make_flash(num_hidden_layers=2)
    rows = np.array(flash.head.clustered.rows.weight)
    result = SlotProduct.result
    used = []

    def coarse(product):
        used.append(product)
        states = in_tf32(np.array(product._hidden, np.float32), cut_off=True)
        slots = result(product)
        return mx.array(np.einsum("kd,cnd->kcn", states, in_tf32(rows, cut_off=True))).astype(
            slots.dtype
        )

    monkeypatch.setattr(rounded_product, "may_use_tf32", lambda: True)
    assert flash.head.rounding(mx.float32, 4).product > TF32
    monkeypatch.setattr(SlotProduct, "result", coarse)
    for seed in range(3):
        flash.checked({"temp": 1.0, "seed": seed})
    flash.checked()
    assert used


@pytest.mark.parametrize("by_tf32", [False, True])
def test_dense_tokens_of_a_batch_are_computed_alone_where_products_are_made_in_tf32(
    monkeypatch, by_tf32
):
    """In float32, too: each token of a text that can be verified later."""
    flash = make_flash(num_hidden_layers=2)
    # Two texts are dense for the time being.
    monkeypatch.setattr(Proposer, "max_batch", 1)
    alone = recorded_calls(monkeypatch, Proposer, "dense_logits")
    monkeypatch.setattr(rounded_product, "may_use_tf32", lambda: by_tf32)
    tokens, _ = flash.batch([[5, 17, 3], [8]], max_tokens=9)
    n_dense_steps = 2 * 7
    if by_tf32:
        assert len(alone) >= n_dense_steps
    else:
        assert len(alone) < n_dense_steps / 2
    assert tokens == flash.batch([[5, 17, 3], [8]], max_tokens=9, dense=True)[0]


@pytest.mark.newest
def test_dense_tokens_of_a_batch_are_computed_alone_where_float32_is_made_of_16_bits(monkeypatch):
    """muse_spark makes float32 of its head's logits: their dtype says nothing of the product."""
    with emulated():
        model = tiny_architecture("muse_spark", tied=False)
        model.lm_head.set_dtype(mx.bfloat16)
        flash = flash_of(model)
        assert model(mx.array([[1]])).dtype == mx.float32
        # Both texts are dense for the time being.
        monkeypatch.setattr(Proposer, "max_batch", 1)
        alone = recorded_calls(monkeypatch, Proposer, "dense_logits")
        flash.batch([[5, 17, 3], [8]], max_tokens=9)
        n_dense_steps = 2 * 7
        assert len(alone) >= n_dense_steps
