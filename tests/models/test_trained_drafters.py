"""What mlx-vlm's drafters draft for models of mlx-lm, against its own loop for the same weights."""

from functools import partial

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

pytest.importorskip("mlx_vlm")

from architecture_configs import COMMON, VOCAB_SIZE
from mlx_flashhead.models.drafted_target import DraftedTarget
from mlx_flashhead.models.drafter_in_text import DrafterInText
from mlx_flashhead.models.locate import find_embedding
from mlx_flashhead.models.trained_drafter import TrainedDrafter
from trained_drafters import FAMILIES, drafter_config, tiny_drafter, tiny_module, tiny_target
from vlm_models import tiny_vlm
from vlm_texts import write_alone

PROMPT = [5, 1, 2, 7, 3]
# A random drafter guesses some of so few tokens.
FEW = 8
METHODS = ("prefill_from_target_hidden", "draft_block", "accept_verified_tokens")


def best(logits, place):
    return mx.argmax(logits, axis=-1)


def begin(model, drafter, **options):
    """A drafter in a text of the model, with its normal head."""
    target = DraftedTarget(model)
    return DrafterInText(drafter, target, project=target.dense_logits, choose=best, **options)


def recorded(module):
    """The calls of a drafter's methods from now on: name, arguments, and result."""
    calls = []
    for name in METHODS:
        if hasattr(module, name):
            setattr(module, name, partial(_call, calls, name, getattr(module, name)))
    return calls


def _call(calls, name, method, *arguments, **options):
    result = method(*arguments, **options)
    calls.append((name, arguments, result))
    return result


@pytest.fixture
def few_tokens(monkeypatch):
    for name, value in COMMON.items():
        if value == VOCAB_SIZE:
            monkeypatch.setitem(COMMON, name, FEW)
        if value == 8 and "window" in name:
            monkeypatch.setitem(COMMON, name, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_have_the_bits_of_mlx_vlms_loop(few_tokens, family):
    """Round by round, from the states of that loop, with right drafts and wrong ones."""
    other = tiny_vlm(FAMILIES[family][0], tied=False)
    model = tiny_target(family, tied=family == "gemma4")
    weights = tree_flatten(other.language_model.parameters())
    if hasattr(model, "language_model"):
        weights = [(f"language_model.{name}", array) for name, array in weights]
    model.load_weights(weights)
    reference = tiny_module(family)
    calls = recorded(reference)
    options = {"draft_model": reference, "draft_kind": "mtp", "max_tokens": 40}
    ids = PROMPT + write_alone(other, PROMPT, **options)
    drafter = begin(model, tiny_drafter(family))
    caches = make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=caches)
    n_fed = len(PROMPT)
    accepted = list(reference.accept_lens)
    # Some drafts are right, and others wrong.
    assert 0 < sum(accepted) < 2 * len(accepted)
    for name, arguments, result in calls:
        if name == "prefill_from_target_hidden":
            tokens, states, first = arguments[:3]
            drafter.read(mx.array([*tokens[0, 1:].tolist(), first]), states[0], 1)
        elif name == "draft_block":
            latest, states, _, width, *_ = arguments
            drafts = drafter.draft(mx.array([latest]), states[0], width - 1, 1, caches)
            assert drafts.tolist() == result[0].tolist()
            n_right = accepted.pop(0)
            model(mx.array([ids[n_fed : n_fed + n_right + 1]]), cache=caches)
            n_fed += n_right + 1
        # At the end of the text nothing is accepted.
        elif arguments[3]:
            drafter.accept(n_right, arguments[0][0], arguments[3][-1], 1)
    assert not accepted
    states = [layer.state for layer in drafter.layers]
    expected = [layer.state for layer in getattr(reference, "_cache", [])]
    arrays = [dict(tree_flatten(each)) for each in (states, expected)]
    assert all(mx.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])


@pytest.mark.parametrize("family", ["qwen3_5", "glm_moe_dsa", "nemotron_h"])
def test_caches_follow_the_text(family):
    """Pairs that are taken back leave no trace, and a drafter goes on from its caches."""
    model = tiny_target(family)
    drafter = tiny_drafter(family)
    states = mx.random.normal((9, 64), key=mx.random.key(1))
    tokens = mx.arange(9)
    straight = begin(model, drafter)
    straight.read(tokens[:6], states[:6], 7)
    expected = straight.draft(tokens[5:6], states[5:6], 3, 7, []).tolist()
    turned = begin(model, drafter)
    turned.read(tokens[:4], states[:4], 5)
    turned.draft(tokens[3:4], states[3:4], 3, 5, [])
    turned.forget_drafts()
    mark = turned.mark()
    turned.read(mx.array([250, 251]), states[7:], 7)
    mark.back_to(0)
    mark = turned.mark()
    turned.read(tokens[4:6], states[4:6], 7)
    assert turned.draft(tokens[5:6], states[5:6], 3, 7, []).tolist() == expected
    turned.forget_drafts()
    mark.back_to(1)
    begun_again = begin(model, drafter, layers=turned.layers)
    begun_again.read(tokens[5:6], states[5:6], 7)
    assert begun_again.draft(tokens[5:6], states[5:6], 3, 7, []).tolist() == expected


def test_two_texts_share_a_drafter():
    model = tiny_target("qwen3_5")
    drafter = tiny_drafter("qwen3_5")
    states = mx.random.normal((2, 3, 64), key=mx.random.key(1))
    texts = [begin(model, drafter) for _ in range(2)]
    for text, own in zip(texts, states, strict=True):
        text.read(mx.arange(3), own, 4)
    drafts = [text.draft(mx.array([2]), states[0, -1:], 1, 4, []) for text in texts]
    alone = begin(model, drafter)
    alone.read(mx.arange(3), states[0], 4)
    assert alone.draft(mx.array([2]), states[0, -1:], 1, 4, []).tolist() == drafts[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_is_found_with_its_scale(family):
    model = tiny_target(family, tied=family == "gemma4")
    module, holder = find_embedding(model)
    assert module["weight"].shape == (VOCAB_SIZE, 64)
    expected_scale = 8.0 if family == "gemma4" else 1.0
    assert getattr(holder, "embed_scale", 1.0) == expected_scale


def test_a_drafters_names():
    kinds = {family: tiny_drafter(family).name for family in FAMILIES}
    assert kinds.pop("gemma4") == "assistant"
    assert set(kinds.values()) == {"MTP"}
    assert isinstance(tiny_drafter("gemma4"), TrainedDrafter)
    assert drafter_config("gemma4")["backbone_hidden_size"] == 64
