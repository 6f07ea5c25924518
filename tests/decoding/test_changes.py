"""Scales, softcaps, penalties, biases and masks: the text is plain mlx-lm's, and neither a proposal
nor its verification computes the logits of all tokens."""

import copy
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from flash_loops import OTHERS, PROMPT, flash_of, make_flash
from kernel_cases import kernels, plain_clusters
from mlx_flashhead import make_sampler
from mlx_flashhead.common.masks import Mask
from mlx_flashhead.decoding.sampling import FEW_ALLOWED, Changes
from mlx_flashhead.decoding.text import Text
from mlx_flashhead.head import adjustment
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.inverse_cdf import InverseCDF
from mlx_flashhead.head.logit_map import IDENTITY
from mlx_flashhead.head.operations import NOTHING_ALLOWED, USUAL, PortableOperations
from mlx_flashhead.head.proposal import Candidates, Selection, Unscored
from mlx_flashhead.models.compat.mlx_lm import PROCESSORS_SEE_PROMPT
from mlx_flashhead.models.logit_maps import logit_map_of
from tiny_models import VOCAB_SIZE, tiny_model

MODELS = {
    "llama, float32": {},
    "softcap, bfloat16, 4 bits": {
        "arch": "gemma2",
        "final_logit_softcapping": 8.0,
        "dtype": mx.bfloat16,
        "bits": 4,
    },
    "softcap, float16": {"arch": "gemma2", "final_logit_softcapping": 5.0, "dtype": mx.float16},
    "scale, bfloat16": {"arch": "cohere", "logit_scale": 0.3, "dtype": mx.bfloat16},
}
PENALTIES = {
    "none": {},
    "bias": {"logit_bias": {5: 3.0, 40: -float("inf"), 7: 2.5}},
    "repetition": {"repetition_penalty": 1.3, "repetition_context_size": 4},
    # These have windows that hold the latest token alone, which is not read yet.
    "latest repeated": {
        "repetition_penalty": 3.0,
        "repetition_context_size": 1,
        "presence_penalty": -0.5,
        "presence_context_size": 12,
    },
    "latest present": {
        "presence_penalty": 30.0,
        "presence_context_size": 1,
        "repetition_penalty": 0.9,
        "repetition_context_size": 12,
    },
    "all": {
        "logit_bias": {5: 1.5, 60: -4.0},
        "repetition_penalty": 0.9,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.7,
        "repetition_context_size": 2,
        "presence_context_size": 3,
        "frequency_context_size": 5,
    },
}


N_TOKENS = 20

# The texts of this file with a rejected proposal.
judged: list = []


def every_third(tokens):
    """Which tokens may come next: a third of them, another one at each place."""
    return np.arange(VOCAB_SIZE) % 3 == len(tokens) % 3


def words(bits, vocab_size):
    """The bits (V,) as words of a mask."""
    more = -vocab_size % 32
    return np.packbits(np.pad(bits, (0, more)), bitorder="little").view(np.uint32)


def mask():
    """A processor that rules out what ``every_third`` leaves."""
    return Mask(lambda tokens, n: words(every_third(tokens), n))


def test_a_mask_rules_tokens_out():
    logits = mx.random.normal((1, VOCAB_SIZE))
    tokens = mx.array([4, 5])
    expected = mx.where(mx.array(every_third(tokens)), logits, -mx.inf)
    assert mx.array_equal(mask()(tokens, logits), expected)
    assert mx.array_equal(Mask(lambda *_: None)(tokens, logits), logits)


class Louder(Mask):
    """Does more than a mask."""

    def __call__(self, tokens, logits):
        return super().__call__(tokens, logits) * 2


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model without a FlashHead, and the same with one."""
    model = tiny_model(num_hidden_layers=2, **MODELS[request.param])
    return copy.deepcopy(model), flash_of(model)


@pytest.fixture
def narrow(monkeypatch):
    """No step may compute the logits of all tokens. An adjustment has no more places than tokens:
    of so few clusters all would be scored for them."""
    monkeypatch.setattr(adjustment, "TOKENS_MULTIPLE", 2)

    def expand(*_):
        raise AssertionError("a proposal computes the logits of all tokens")

    monkeypatch.setattr(PortableOperations, "expand", expand)


def plain_tokens(model, **options):
    """What mlx-lm's own loop writes."""
    steps = generate_step(mx.array(PROMPT), model, max_tokens=N_TOKENS, **options)
    return [int(token) for token, _ in steps]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "penalties, masked",
    [*((name, False) for name in PENALTIES), ("none", True), ("all", True)],
)
def test_the_text_is_mlx_lms(pair, misses, penalties, masked):
    dense, flash = pair
    processors = make_logits_processors(**PENALTIES[penalties])
    if masked:
        processors = [*processors, mask()]
    expected = plain_tokens(dense, logits_processors=processors)
    assert flash.tokens(logits_processors=processors, max_tokens=N_TOKENS) == expected
    judged.extend(misses)


def test_proposals_were_rejected():
    """Else the texts before this one show nothing."""
    assert len(judged) > 20


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "settings, penalties",
    [({"temp": 1.0}, "bias"), ({"temp": 0.8, "top_p": 0.9, "top_k": 50}, "all")],
)
def test_drawn_text_is_the_dense_loops(pair, misses, settings, penalties):
    _, flash = pair
    processors = [*make_logits_processors(**PENALTIES[penalties]), mask()]
    options = {"max_tokens": N_TOKENS}
    flash.checked(settings | {"seed": 3}, logits_processors=processors, **options)
    flash.checked(settings | {"seed": 4}, logits_processors=processors[:-1], **options)
    judged.extend(misses)


@pytest.mark.usefixtures("narrow")
def test_texts_of_a_batch_have_processors_of_their_own(pair):
    _, flash = pair
    kinds = [PENALTIES[name] for name in ("none", "bias", "repetition", "all")]
    each = [make_logits_processors(**kind) for kind in kinds]
    each[1].append(mask())
    prompts = [PROMPT, *OTHERS]
    samplers = [make_sampler(), make_sampler(0.9, seed=1), make_sampler(), make_sampler(1, 0.8)]
    options = {"logits_processors": each, "samplers": samplers[:4]}
    found, _ = flash.batch(prompts, **options)
    expected, _ = flash.batch(prompts, dense=True, **options)
    assert found == expected


@pytest.mark.parametrize("n_allowed", [1, FEW_ALLOWED, FEW_ALLOWED + 1])
def test_a_mask_that_leaves_few_tokens(misses, n_allowed):
    """They are scored, if they are few. Else the dense row may choose at once."""
    model = tiny_model(num_hidden_layers=2)
    dense = copy.deepcopy(model)
    flash = flash_of(model)

    def few(tokens):
        first = 11 * len(tokens) % (VOCAB_SIZE - n_allowed)
        return np.isin(np.arange(VOCAB_SIZE), np.arange(first, first + n_allowed))

    processors = [Mask(lambda tokens, n: words(few(tokens), n))]
    found = flash.tokens(logits_processors=processors, max_tokens=N_TOKENS)
    assert found == plain_tokens(dense, logits_processors=processors)
    # The processors of mlx-lm 0.31 see the last token of a prompt alone.
    seen = PROMPT if PROCESSORS_SEE_PROMPT else PROMPT[-1:]
    assert all(few(seen + found[:i])[token] for i, token in enumerate(found))
    assert bool(misses) == (n_allowed > FEW_ALLOWED)


def test_where_no_scored_token_may_be_chosen_a_padded_slot_is_not_either():
    # Two slots are padded.
    operations = PortableOperations(plain_clusters(np.random.default_rng(0), 3, 4))
    logits = mx.full((1, 3, 4), mx.finfo(mx.float32).min)
    left = Unscored(mx.zeros((1, 1)), mx.zeros((1, 1)))
    selection = Selection(mx.array([[0, 1, 2]], mx.uint32), unscored=left)
    settings = InverseCDF(temperature=1.0)
    for number in np.linspace(0, 0.99, 40, dtype=np.float32):
        draws = Draws.of([(settings, (int(number.view(np.uint32)), 0))])
        candidates = Candidates(logits)
        token, risk = operations.choose(selection, candidates, draws, USUAL, IDENTITY, masked=True)
        assert token.item() < 10 and risk.item() == NOTHING_ALLOWED


@pytest.mark.parametrize(
    "processors, known",
    [
        (make_logits_processors(**PENALTIES["all"]), True),
        # These have another order.
        (make_logits_processors(**PENALTIES["all"])[::-1], False),
        (make_logits_processors(**PENALTIES["repetition"]) * 2, False),
        (make_logits_processors(repetition_penalty=1.1, repetition_context_size=0), False),
        (make_logits_processors(repetition_penalty=1.1, repetition_context_size=5000), False),
        (make_logits_processors({5: -math.inf}), True),
        (make_logits_processors({5: math.inf}), False),
        (make_logits_processors({5: math.nan}), False),
        ([mask()], True),
        ([mask(), mask()], False),
        ([Louder(lambda *_: None)], False),
        ([mask(), *make_logits_processors(**PENALTIES["bias"])], False),
        ([lambda tokens, logits: logits], False),
    ],
)
def test_what_is_known_of_processors(processors, known):
    assert (Changes.of(processors) is not None) == known
    text = Text(make_sampler(), processors, mx.array(PROMPT))
    assert text.is_known == known


def test_a_settings_change_counts_from_the_next_text_on():
    """A softcap or a scale is read when a text begins."""
    model = tiny_model("gemma2", num_hidden_layers=2, final_logit_softcapping=30.0)
    dense = copy.deepcopy(model)
    flash = flash_of(model)
    processors = make_logits_processors(logit_bias={7: 1.0, 9: 2.0})
    for cap in (30.0, 2.0, 5.5):
        dense.final_logit_softcapping = cap
        model.final_logit_softcapping = cap
        expected = plain_tokens(dense, logits_processors=processors)
        assert flash.tokens(logits_processors=processors, max_tokens=N_TOKENS) == expected
        assert logit_map_of(model).cap == cap
    scaled = make_flash("cohere", logit_scale=0.25)
    for scale in (0.25, 3.0, 1.0):
        scaled.model.args.logit_scale = scale
        assert logit_map_of(scaled.model).multiplier == scale
        scaled.checked({"temp": 0.7, "seed": 1})


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 70_000])
def test_a_model_that_rules_out_a_token_sees_whole_rows(vocab_size):
    """MLX would write beyond the end of shorter ones, into other arrays."""
    model = tiny_model(tied=False, num_hidden_layers=2, vocab_size=vocab_size)
    last = mx.arange(vocab_size)[:, None] == vocab_size - 1
    model.lm_head.weight = mx.where(last, 40 * model.lm_head.weight, model.lm_head.weight)
    widths = set()
    ruled_out = mx.array([vocab_size - 1])

    class Strict(type(model)):
        def __call__(self, *args, **options):
            logits = super().__call__(*args, **options)
            widths.add(logits.shape[-1])
            logits[..., ruled_out] = -mx.inf
            return logits

    assert vocab_size - 1 in plain_tokens(model)
    model.__class__ = Strict
    expected = plain_tokens(model)
    flash = flash_of(model)
    assert flash.tokens(max_tokens=N_TOKENS) == expected
    assert logit_map_of(model) is None
    assert widths == {vocab_size}


@pytest.mark.newest
@pytest.mark.parametrize("name", ["none", "all"])
def test_on_the_kernels(misses, name):
    """A softcap, penalties and a mask, greedy and drawn: no kernel but those of every text, and one
    that changes the scored logits."""
    options = MODELS["softcap, bfloat16, 4 bits"]
    with kernels(check=False) as emulator:
        flash = flash_of(tiny_model(num_hidden_layers=2, **options))
        processors = make_logits_processors(**PENALTIES[name])
        if emulator is not None:
            emulator.dispatches.clear()
        for more in ([], [mask()]):
            flash.checked({}, logits_processors=processors + more, max_tokens=N_TOKENS)
        flash.checked(
            {"temp": 0.9, "top_p": 0.9, "seed": 2},
            logits_processors=processors,
            max_tokens=N_TOKENS,
        )
        assert misses
    if emulator is not None:
        names = {dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches}
        assert "expand" not in names and "adjust" in names
