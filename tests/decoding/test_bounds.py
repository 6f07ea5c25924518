"""Bounds of rounding: whatever lies within them, no text differs."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import sample_utils

from flash_loops import flash_of, make_flash
from mlx_flashhead.decoding import rounding, verification
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
    result = rounding.SlotProduct.result
    screen = verification.Verification._screen

    def wrong(product):
        slots = result(product)
        if not hasattr(product, "tolerance"):  # it is being measured
            return slots
        injected.append(product)
        signs = mx.random.randint(0, 2, slots.shape, key=mx.random.key(len(injected))) * 2 - 1
        exact = slots.astype(mx.float32)
        tolerance = product.tolerance
        off = tolerance.product[:, None, None] + tolerance.relative / 2 * mx.abs(exact)
        return (exact + 0.99 * signs * off).astype(slots.dtype)

    def with_tolerance(verification):
        hidden = verification._proposal.hidden
        verification._product.tolerance = verification._rounding.tolerance(
            hidden, verification._head.steps
        )
        screen(verification)

    monkeypatch.setattr(rounding.SlotProduct, "result", wrong)
    monkeypatch.setattr(verification.Verification, "_screen", with_tolerance)
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
    decide = verification.Verification._decide

    def noting(verification):
        flags.extend(verification._certain.tolist())
        decide(verification)

    monkeypatch.setattr(verification.Verification, "_decide", noting)
    return flags


@pytest.mark.parametrize("sampler", ["greedy", "top-p"])
def test_a_head_that_cancels_large_terms(sampler, judged):
    """Its logits are small, and the rounding of their sums is not: no fault is needed."""
    model = tiny_model(num_hidden_layers=2, tied=False)
    weights = dict(tree_flatten(model.parameters()))
    for name, array in weights.items():  # two coordinates of a state are always equal
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
        settings = SAMPLERS[sampler] | ({"seed": seed} if sampler != "greedy" else {})
        flash.checked(settings, prompt=[17 * seed, 5, 10, 15, 20, 25], max_tokens=40)
    assert len(judged) > 100 and not all(judged)


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_doubts_are_few_with_a_penalty(judged, penalty):
    """Scored logits are exact, so that rounding leaves few positions in doubt in bfloat16."""
    flash = make_flash(num_hidden_layers=2, dtype=mx.bfloat16)
    processors = sample_utils.make_logits_processors(repetition_penalty=penalty)
    flash.tokens(logits_processors=processors, n_probes=20)
    assert len(judged) > 20 and sum(judged) > 0.7 * len(judged)
