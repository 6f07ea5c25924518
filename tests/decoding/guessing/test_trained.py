"""Texts with a trained drafter are plain mlx-lm's, whatever is right of its drafts."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

pytest.importorskip("mlx_vlm")

from always_guessing import guess_always
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.drafting import drafted_tokens
from mlx_flashhead.decoding.guessing import trained
from mlx_flashhead.decoding.guessing.trained import TrainedDrafts
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.models.compat.mlx_vlm import length_of_pairs
from tiny_models import install_index, tiny_index
from trained_drafters import FAMILIES, exact_pair, tiny_drafter, tiny_target

PROMPT = [5, 9, 200, 7, 3, 17, 99]
TOKENS = 30
SAMPLERS = {
    "greedy": lambda: None,
    "mlx-lm's": lambda: mlx_lm_sampler(temp=0.9, top_p=0.95),
    "own": lambda: make_sampler(temp=0.9, seed=4),
}
PENALTIES = {
    "none": lambda: None,
    "repetition": lambda: make_logits_processors(repetition_penalty=1.3),
    "bias": lambda: make_logits_processors({7: 2.0}),
}


def unrelated_pair(family):
    """A model and a drafter that knows nothing of it."""
    return tiny_target(family), tiny_drafter(family)


PAIRS = {
    "nothing right": unrelated_pair,
    "all right": exact_pair,
    "some right": partial(exact_pair, noise=0.3),
}


@pytest.fixture(autouse=True)
def drafts_alone(monkeypatch):
    guess_always(monkeypatch)


def with_head(model: nn.Module, n_probes: int = 20) -> nn.Module:
    install_index(model, tiny_index(model, n_probes=n_probes), backend="mlx")
    return model


def drafted(model, drafter, n_drafts=3, *, prompt=PROMPT, max_tokens=TOKENS, **options):
    """Tokens, MLX's random states after them, and the proposer."""
    mx.random.seed(3)
    proposer = Proposer(model, DecodingSettings())
    options |= {"num_draft_tokens": n_drafts, "max_tokens": max_tokens, "proposer": proposer}
    steps = drafted_tokens(mx.array(prompt), model, drafter, **options)
    tokens = [(token, mx.random.state[0].tolist()) for token, *_ in steps]
    return tokens, proposer


def plain(model, *, prompt=PROMPT, max_tokens=TOKENS, **options):
    mx.random.seed(3)
    steps = generate_step(mx.array(prompt), model, max_tokens=max_tokens, **options)
    return [(token, mx.random.state[0].tolist()) for token, _ in steps]


def shares(proposer):
    """Guesses, and how many of them were right."""
    (guesses,) = proposer.judged.values()
    n_guessed = sum(n for n, _ in guesses)
    n_right = sum(right for _, right in guesses)
    return n_guessed, n_right


@pytest.mark.parametrize("flash", [False, True], ids=["dense", "FlashHead"])
@pytest.mark.parametrize("right", PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts(family, right, flash):
    model, drafter = PAIRS[right](family)
    expected = plain(model)
    if flash:
        with_head(model)
    tokens, proposer = drafted(model, drafter)
    assert tokens == expected
    n_made, n_right = shares(proposer)
    if right == "all right" and not flash:
        assert n_right == n_made and proposer.n_steps <= -(-TOKENS // 4) + 1
    elif right == "some right" and not flash:
        assert 0 < n_right < n_made
    elif right == "nothing right":
        assert n_right < n_made / 4


@pytest.mark.parametrize("flash", [False, True], ids=["dense", "FlashHead"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("sampler", ["mlx-lm's", "own"])
def test_sampled_texts(sampler, penalty, flash):
    """MLX's random state is what mlx-lm would have left at each token, too."""
    model, drafter = exact_pair("qwen3_5", noise=0.3)
    options = {"sampler": SAMPLERS[sampler](), "logits_processors": PENALTIES[penalty]()}
    # The text of this package's sampler is the one without drafts.
    if sampler == "own":
        expected = without_drafts(model, **options)
    else:
        expected = [token for token, _ in plain(model, **options)]
        states = [state for _, state in plain(model, **options)]
    if flash:
        with_head(model)
    options["sampler"] = SAMPLERS[sampler]()
    tokens, proposer = drafted(model, drafter, **options)
    assert [token for token, _ in tokens] == expected
    if sampler != "own":
        assert [state for _, state in tokens] == states
    assert shares(proposer)[1] > 0


def without_drafts(model, **options):
    mx.random.seed(3)
    proposer = Proposer(model, DecodingSettings(lookup="off"))
    options |= {"proposer": proposer, "max_tokens": TOKENS}
    return [token for token, _ in verified_tokens(mx.array(PROMPT), model, **options)]


def test_sampled_drafts_are_drawn_as_the_text_is():
    """With everything right, nearly all sampled drafts are, and by far more than by chance."""
    model, drafter = exact_pair("qwen3_5")
    for name in ("mlx-lm's", "own"):
        _, proposer = drafted(model, drafter, sampler=SAMPLERS[name]())
        n_made, n_right = shares(proposer)
        assert n_right > 0.9 * n_made


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4"])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_wrong_drafts_at_every_depth_over_turns_with_one_cache(family, depth, monkeypatch):
    """The drafts are right up to a place that goes round, and wrong from there on."""
    model, drafter = exact_pair(family)
    counts = []
    make = TrainedDrafts._drafts

    def spoiled(self, text, latest, n):
        drafts = make(self, text, latest, n)
        place = len(counts) % (n + 1)
        counts.append(place)
        ids = mx.arange(n)
        return mx.where(ids < place, drafts, (drafts + 1) % 200)

    monkeypatch.setattr(TrainedDrafts, "_drafts", spoiled)
    cache = make_prompt_cache(model)
    ours = make_prompt_cache(model) + drafter.make_cache()
    held = []
    for turn in (PROMPT, [5, 9, 77], [60]):
        expected = plain(model, prompt=turn, max_tokens=13, prompt_cache=cache)
        tokens, _ = drafted(
            model, drafter, depth, prompt=turn, max_tokens=13, prompt_cache=ours, context=held
        )
        assert tokens == expected
        held += [*turn, *(token for token, _ in tokens)]
        for layer in ours[len(cache) :]:
            assert length_of_pairs(layer) <= len(held) - 1
        for one, other in zip(cache, ours, strict=False):
            assert getattr(one, "offset", 0) == getattr(other, "offset", 0)
    assert {*counts} and len(counts) > 9
    after = [model(mx.array([[77]]), cache=each)[0, -1] for each in (cache, ours[: len(cache)])]
    assert mx.array_equal(*after)


@pytest.mark.parametrize("start", [0, 12])
def test_quantized_caches(start):
    model, drafter = exact_pair("qwen3_5", noise=0.3)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    expected = plain(model, **options)
    assert drafted(model, drafter, **options)[0] == expected


def test_the_drafters_cache_goes_on_from_turn_to_turn():
    model, drafter = exact_pair("qwen3_5")
    cache = make_prompt_cache(model) + drafter.make_cache()
    held = []
    lengths = []
    for turn in (PROMPT, [5, 9, 77], [60, 61]):
        options = {"prompt": turn, "max_tokens": 9, "prompt_cache": cache, "context": held}
        tokens, _ = drafted(model, drafter, **options)
        held = [*held, *turn, *(token for token, _ in tokens)]
        lengths.append(length_of_pairs(cache[-1]))
        assert lengths[-1] <= len(held) - 1
    # A pair is missing between two turns.
    assert lengths[-1] >= len(held) - len(lengths)


def test_many_single_steps_are_caught_up(monkeypatch):
    """Where drafts do not pay for a while, their pairs are read in few passes."""
    model, drafter = exact_pair("qwen3_5")
    offer = TrainedDrafts.offer

    def offer_late(self, text, latest):
        if text.n_chosen > 100:
            return offer(self, text, latest)
        return None

    monkeypatch.setattr(TrainedDrafts, "offer", offer_late)
    monkeypatch.setattr(trained, "WAITING", 16)
    expected = plain(model, max_tokens=120)
    tokens, proposer = drafted(model, drafter, max_tokens=120)
    assert tokens == expected
    n_made, n_right = shares(proposer)
    assert n_made == n_right > 9


def batched(generator, prompts, limits):
    """The texts of a batch, the later ones of which join it."""
    texts = {}
    uids = generator.insert(prompts[:1], limits[:1])
    n_steps = 0
    responses = generator.next_generated()
    while responses:
        for response in responses:
            texts.setdefault(response.uid, []).append(response.token)
        n_steps += 1
        if n_steps == 6 and len(prompts) > 1:
            uids += generator.insert(prompts[1:], limits[1:])
        responses = generator.next_generated()
    generator.close()
    return [texts[uid] for uid in uids]


@pytest.mark.parametrize("flash", [False, True], ids=["dense", "FlashHead"])
@pytest.mark.parametrize("family", ["qwen3_5", "gemma4"])
def test_the_text_that_is_alone_in_a_batch_is_guessed(family, flash):
    """Before another one joins it, and after that one has left; several are not."""
    model, drafter = exact_pair(family, noise=0.3)
    prompts = [PROMPT, [9, 5, 66, 12]]
    limits = [80, 5]
    expected = batched(BatchGenerator(model, stop_tokens=[]), prompts, limits)
    if flash:
        with_head(model)
    proposer = Proposer(model, DecodingSettings())
    generator = VerifiedBatchGenerator(
        model, proposer=proposer, drafter=drafter, num_draft_tokens=3
    )
    assert batched(generator, prompts, limits) == expected
    n_made, n_right = shares(proposer)
    assert n_made > 20 and n_right > 2


def test_without_wide_steps_nothing_is_drafted(caplog):
    model, drafter = exact_pair("qwen3_5")
    expected = plain(model)
    # Nothing is known of this class.
    model.__class__ = type("OddHeads", (type(model),), {})
    tokens, proposer = drafted(model, drafter)
    assert tokens == expected
    assert not proposer.judged
