"""The loops of mlx-lm in a program under ``run``, in this process."""

import copy
import importlib
import pickle
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from mlx_flashhead.decoding.phase import NO_HEAD, REPLACED, TRAINED
from mlx_flashhead.loading import programs, use
from mlx_flashhead.loading.head_options import DENSE, LATER, HeadOptions
from mlx_flashhead.models.install import get_flash_head
from under_run import CACHES, OWN, Under, fails, generate, steps_of, texts


def test_tokens_are_counted_by_how_they_were_decoded(under, plain):
    model, prompts, expected = plain
    assert texts(under.batch_generator(under.model), prompts) == expected
    assert under.lines() == ["model: verified."]
    unknown = lambda logprobs: mx.argmax(logprobs, axis=-1)  # noqa: E731
    found = steps_of(under.steps, under.model, prompts[0], sampler=unknown)
    assert found == steps_of(OWN["generate_step"], model, prompts[0], sampler=unknown)
    again = steps_of(under.steps, under.model, prompts[0], sampler=unknown)
    assert again == found
    reason = "dense: its sampler, or one of its processors, cannot be verified"
    assert under.lines() == ["model: verified.", f"model: {reason}."]
    n_batch = sum(map(len, expected))
    n_all = n_batch + 2 * len(found)
    assert under.patches.models.use_of(under.model).summary() == (
        f"Checked model: {n_all} tokens: {n_batch - 3} verified ({(n_batch - 3) / n_all:.0%}); "
        f"3 the first of their texts, by their prompts; {2 * len(found)} {reason}."
    )


def test_a_text_says_how_it_is_decoded_before_its_first_token(under, plain):
    steps = under.steps(mx.array(plain[1][0]), under.model, max_tokens=4)
    assert under.lines() == []
    next(steps)
    assert under.lines() == ["model: verified."]
    steps.close()


USED = (
    "model: dense: between tokens the program uses the text's caches, processors or random state."
)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_in_the_middle_of_a_text_waits_on_a_terminal(under, plain, monkeypatch, terminal):
    """For the next text, or the end of the process."""
    monkeypatch.setattr(use.sys, "stderr", Mock(isatty=lambda: terminal))
    processors = []
    prompt = mx.array(plain[1][0])
    steps = under.steps(prompt, under.model, max_tokens=8, logits_processors=processors)
    for _ in range(3):
        next(steps)
    processors.append(lambda tokens, logits: logits)
    assert len(list(steps)) == 5
    expected = ["model: verified."]
    if not terminal:
        expected.append(USED)
    assert under.lines() == expected
    steps_of(under.steps, under.model, plain[1][0])
    assert under.lines() == ["model: verified.", USED]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_loop_of_its_own_is_said_after_its_text_on_a_terminal(
    under, plain, monkeypatch, terminal
):
    monkeypatch.setattr(use.sys, "stderr", Mock(isatty=lambda: terminal))
    under.patches.models.use_of(under.model)
    said = []
    for _ in range(2):
        cache = CACHES.make_prompt_cache(under.model)
        tokens = mx.array([plain[1][0]])
        for _ in range(6):
            tokens = mx.argmax(under.model(tokens, cache=cache)[:, -1], axis=-1)[None]
        said.append(under.lines())
    line = f"model: {use.DENSE_LOOP}."
    before_the_next = [line]
    if terminal:
        before_the_next = []
    assert said == [before_the_next, [line]]


def test_another_models_trained_drafter_ends_the_text_with_a_sentence(plain):
    """Mlx-lm's own loop could not take it."""
    pytest.importorskip("mlx_vlm")
    trained_drafters = importlib.import_module("trained_drafters")
    patches = programs.Patches(HeadOptions(missing=DENSE))
    steps = patches.loops.loop(patches.loops.drafted_loop, generate.speculative_generate_step)
    drafter = trained_drafters.tiny_drafter("qwen3_5")
    with pytest.raises(ValueError, match="give the drafter that was trained with it"):
        next(steps(mx.array([5, 9, 77]), plain[0], drafter, max_tokens=8))


def test_a_drafted_text_is_the_same_before_its_flash_head_is_built_and_after(
    program_folder, plain, quick, monkeypatch
):
    """One loop takes it, whose text is the one without a draft model."""
    monkeypatch.setattr("mlx_flashhead.loading.use.QUIET_SECONDS", 0.0)
    monkeypatch.setattr(HeadOptions, "say", lambda _, text: said.append(text))
    model, prompts, _ = plain
    said = []
    options = HeadOptions(missing=LATER, always=True)
    patches = programs.Patches(options)
    draft, tokenizer = mlx_lm.load(str(program_folder / "model"))
    patches.models.attach(draft, lambda: tokenizer, program_folder / "model")
    (first_use,) = patches.models._first_uses.values()
    steps = patches.loops.loop(patches.loops.drafted_loop, generate.speculative_generate_step)
    expected = steps_of(OWN["generate_step"], model, prompts[0])
    for is_built in (False, True):
        assert (get_flash_head(draft) is not None) == is_built
        found = steps(mx.array(prompts[0]), model, draft, max_tokens=8)
        assert [token for token, *_ in found] == expected
        ways = [line for line in said if line.startswith("Text of")]
        # From the first text on.
        assert ways[0] == f"Text of model: {NO_HEAD}."
        batches = patches.loops.batches(OWN["BatchGenerator"])(draft)
        while get_flash_head(draft) is None and first_use.build.under_way:
            texts(batches, prompts)
        texts(batches, prompts)


def test_copies_of_a_model(under, plain):
    """One in the same process is verified as well, and a pickled one is dense."""
    _, prompts, expected = plain
    for copied, lines in (
        (pickle.loads(pickle.dumps(under.model)), []),
        (copy.deepcopy(under.model), ["model: verified."]),
    ):
        assert texts(under.batch_generator(copied), prompts) == expected
        assert under.lines() == lines


class Around(nn.Module):
    """A module around a model that forbids a token."""

    def __init__(self, model, forbidden):
        super().__init__()
        self.model = model
        self.forbidden = forbidden

    def __call__(self, tokens, cache=None):
        logits = self.model(tokens, cache=cache)
        logits[..., self.forbidden] = -mx.inf
        return logits

    @property
    def layers(self):
        return self.model.layers


def test_what_is_around_a_model_is_mlx_lm_s(under, plain):
    """A module, a plain object and a function: their texts are those without us."""
    model, prompts, expected = plain
    forbidden = expected[0][2]
    around = Around(under.model, forbidden), Around(model, forbidden)
    assert texts(under.batch_generator(around[0]), prompts) == texts(
        OWN["BatchGenerator"](around[1]), prompts
    )
    assert under.lines() == [
        "model: dense: the model is wrapped or changed, so nothing is known of its text."
    ]

    class Plain:
        def __init__(self, inner):
            self.inner = inner
            self.layers = inner.layers

        def __call__(self, tokens, cache=None):
            return self.inner(tokens, cache=cache)

    cached = [mlx_lm.models.cache.make_prompt_cache(model) for _ in range(2)]
    functions = [
        lambda tokens, cache=None, m=m: m(tokens, cache=cache) for m in (under.model, model)
    ]
    for made in (Plain(under.model), Plain(model)), functions:
        caches = [mlx_lm.models.cache.make_prompt_cache(model) for _ in cached]
        found = [
            steps_of(loop, each, prompts[0], prompt_cache=cache)
            for loop, each, cache in zip(
                (under.steps, OWN["generate_step"]), made, caches, strict=True
            )
        ]
        assert found[0] == found[1]


def test_what_fails_when_a_text_begins_leaves_it_to_mlx_lm(under, plain, monkeypatch):
    model, prompts, expected = plain
    monkeypatch.setattr("mlx_flashhead.decoding.proposer.logit_map_of", fails)
    assert texts(under.batch_generator(under.model), prompts) == expected
    assert under.lines() == ["model: dense: [metal] out of memory."]
    found = steps_of(under.steps, under.model, prompts[0])
    assert found == steps_of(OWN["generate_step"], model, prompts[0])
    assert under.said[1] == "Without FlashHead: [metal] out of memory"


def test_the_head_takes_a_single_state(under, plain):
    hidden = mx.random.normal((64,), key=mx.random.key(1))
    expected = plain[0].model.embed_tokens.as_linear(hidden)
    for found in (
        under.model.model.embed_tokens.as_linear(hidden),
        get_flash_head(under.model).unverified_logits(hidden, n_probes=33),
    ):
        assert found.shape == expected.shape
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_replaced_name_of_mlx_lms_loop_is_called(under, plain, monkeypatch):
    model, prompts, _ = plain
    expected = steps_of(OWN["generate_step"], model, prompts[0])
    made = []
    original = CACHES.make_prompt_cache

    def make_prompt_cache(*arguments, **options):
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(CACHES, "make_prompt_cache", make_prompt_cache)
    assert steps_of(under.steps, under.model, prompts[0]) == expected
    assert len(made) == 1 and made[0][0].offset > len(prompts[0])
    assert under.lines() == [f"model: {REPLACED}."]


def test_mlx_lms_loop_decodes_a_model_in_training(program_folder, plain, monkeypatch):
    """The program's name for that loop is ours, which must not be taken for it."""
    model, prompts, _ = plain
    expected = steps_of(OWN["generate_step"], model, prompts[0])
    under = Under(program_folder)
    under.model.dropout = nn.Dropout(0.3)
    under.model.train()
    monkeypatch.setattr(generate, "generate_step", under.steps)
    assert steps_of(under.steps, under.model, prompts[0]) == expected
    assert under.lines() == [f"model: {TRAINED}."]
