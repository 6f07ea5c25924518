"""What logits processors leave is the dense model's, in each of mlx-lm's loops."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from mlx_flashhead import exact_processors, get_flash_head
from mlx_flashhead.models import exact
from mlx_flashhead.models.compat.generate import (
    BatchGenerator,
    generate_step,
    speculative_generate_step,
)
from mlx_flashhead.models.install import install
from tiny_models import tiny_index, tiny_model

VOCAB_SIZE, N_PROBES, TOKENS = 2001, 3, 12
PROMPT = [3, 1200, 7, 7, 500]
PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.8, "frequency_penalty": 0.3}


def flash_model(**kwargs):
    model = tiny_model(vocab_size=VOCAB_SIZE, **kwargs)
    index = tiny_index(model)
    install(model, index.token_ids, index.centroids, n_probes=N_PROBES)
    return model


@pytest.fixture(scope="module")
def dense():
    return tiny_model(vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def flash():
    return flash_model()


def only(n_tokens: int, seed: int = 0):
    """A processor that allows ``n_tokens`` tokens, others for each number of tokens before."""

    def processor(tokens, logits):
        rng = np.random.default_rng((seed, len(tokens)))
        mask = np.full(VOCAB_SIZE, -np.inf, dtype=np.float32)
        mask[rng.choice(VOCAB_SIZE, n_tokens, replace=False)] = 0
        return logits + mx.array(mask)

    return processor


def writing(tokens, logits):
    """Rules out half of the tokens in the array that it is given, as some processors do."""
    logits[:, ::2] = -mx.inf
    return logits


PROCESSORS = {
    "3 tokens": [only(3)],
    "300 tokens": [only(300)],
    "writes": [writing],
    "bias": make_logits_processors(logit_bias={5: 8.0, 1999: 7.5, 31: -9.0}),
    "penalties": make_logits_processors(**PENALTIES),
    "all": [only(400), *make_logits_processors(logit_bias={5: 3.0}, **PENALTIES)],
}


def run(model, processors, prompt=PROMPT, **options):
    """Tokens, and log-probabilities (tokens, V)."""
    steps = generate_step(
        mx.array(prompt), model, max_tokens=TOKENS, logits_processors=processors, **options
    )
    tokens, logprobs = zip(*steps, strict=True)
    return list(tokens), np.array(mx.stack(logprobs))


@pytest.mark.parametrize("name", PROCESSORS)
def test_one_sequence(dense, flash, name):
    processors = PROCESSORS[name]
    expected, theirs = run(dense, processors)
    found, ours = run(flash, exact_processors(processors, flash))
    assert found == expected
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert not np.allclose(run(flash, processors)[1], theirs, atol=1e-3)  # without: estimates


@pytest.mark.parametrize("n_allowed", [30, 1000])
def test_an_estimate_never_decides(flash, monkeypatch, n_allowed):
    """With fewer clusters than hold allowed tokens the choice is still one that was scored."""
    monkeypatch.setattr(exact, "MORE_CLUSTERS", 2)
    (processor,) = exact_processors([only(n_allowed)], flash)
    hidden = []
    head = get_flash_head(flash)
    for token in range(40):
        logits = flash(mx.array([[token]]))[:, -1]
        hidden.append(processor._latest.call.hidden)
        found = processor(mx.array(PROMPT), logits)
        best = mx.argmax(found, axis=-1, keepdims=True)
        exact_logit = head.logits_of(hidden[-1], best)
        assert mx.allclose(mx.take_along_axis(found, best, axis=-1), exact_logit, atol=1e-4)


@pytest.mark.parametrize("arch", ["gemma2", "cohere", "qwen2"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_models_that_cap_or_scale(arch, dtype):
    options = {"dtype": dtype, "vocab_size": VOCAB_SIZE, "arch": arch}
    expected, _ = run(tiny_model(**options), [only(50)])
    options.pop("vocab_size")
    model = flash_model(**options)
    assert run(model, exact_processors([only(50)], model))[0] == expected


def batch(model, prompts, processors, arrivals):
    """Tokens of each prompt, where prompt i joins after ``arrivals[i]`` steps."""
    generator = BatchGenerator(model, prefill_batch_size=2)
    found, uids, step = {}, [], 0
    while len(uids) < len(prompts) or any(len(tokens) < TOKENS for tokens in found.values()):
        for i in range(len(uids), len(prompts)):
            if arrivals[i] <= step:
                (uid,) = generator.insert([prompts[i]], [TOKENS], logits_processors=[processors[i]])
                uids.append(uid)
                found[uid] = []
        for response in generator.next_generated():
            found[response.uid].append(response.token)
        step += 1
    generator.close()
    return [found[uid] for uid in uids]


@pytest.mark.parametrize("arrivals", [(0, 0, 0, 0), (0, 1, 3, 5)])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_batch(arch, arrivals):
    """Each sequence by its own state; one of them has no processor."""
    dense, flash = tiny_model(arch, vocab_size=VOCAB_SIZE), flash_model(arch=arch)
    prompts = [PROMPT, [1, 2, 3], [1999, 4], PROMPT[:2]]
    processors = [[only(20)], [], [only(500, seed=1), *PROCESSORS["penalties"]], [only(4)]]
    expected = [run(dense, p, ids)[0] for ids, p in zip(prompts, processors, strict=True)]
    ours = [exact_processors(p, flash) for p in processors]
    found = batch(flash, prompts, ours, arrivals)
    assert found[0] == expected[0] and found[2:] == expected[2:]
    assert found[1] == run(flash, [], prompts[1])[0]


@pytest.mark.parametrize("other", ["dense", "flash", "another"])
def test_draft_model(dense, flash, other):
    """It is given the same processors, with logits of its own."""
    draft = {"dense": dense, "flash": flash_model(), "another": flash_model(seed=1)}[other]

    def tokens(target, draft, processors):
        steps = speculative_generate_step(
            mx.array(PROMPT), target, draft, num_draft_tokens=3, max_tokens=TOKENS,
            logits_processors=processors,
        )  # fmt: skip
        return [token for token, *_ in steps]

    processors = PROCESSORS["all"]
    expected = tokens(dense, dense, processors)
    assert tokens(flash, draft, exact_processors(processors, flash, draft)) == expected


@pytest.mark.parametrize("length", [1, 5, 32, 40])
def test_last_position_of_several(dense, flash, length):
    """As in a loop of one's own, which reads a prompt at once; above 32 the head is dense."""
    ids = mx.array([[*range(length)], [*range(length, 2 * length)]])
    (ours,) = exact_processors([only(30)], flash)
    for row in range(2):
        found = ours(ids[row], flash(ids)[row : row + 1, -1])
        expected = only(30)(ids[row], dense(ids)[row : row + 1, -1])
        assert mx.allclose(found, expected, atol=1e-3)


def test_several_rows_at_once(dense, flash):
    ids = mx.array([[7], [9], [11]])
    (ours,) = exact_processors([only(30)], flash)
    found = ours(mx.array(PROMPT), flash(ids)[::-1, -1])
    assert mx.allclose(found, only(30)(mx.array(PROMPT), dense(ids)[::-1, -1]), atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_logits_of_another_origin_are_left_alone(arch):
    flash = flash_model(arch=arch)
    processor = only(30)
    (ours,) = exact_processors([processor], flash)
    tokens = mx.array(PROMPT)
    assert ours(tokens, mx.zeros((1, VOCAB_SIZE))).shape == (1, VOCAB_SIZE)  # before any call
    logits = flash(mx.array([[1]]))[:, -1]
    for other in (flash(mx.array([[2]]))[:, -1] + 1, mx.zeros((1, VOCAB_SIZE)), logits + 0.1):
        assert mx.array_equal(ours(tokens, other), processor(tokens, other))


def test_tokens_may_be_a_list_or_none(dense, flash):
    (ours,) = exact_processors([lambda _, logits: logits * 1.0], flash)
    for tokens in (PROMPT, [], mx.array([], dtype=mx.uint32)):
        found = ours(tokens, flash(mx.array([[1]]))[:, -1])
        assert mx.allclose(found, dense(mx.array([[1]]))[:, -1], atol=1e-3)


def test_exact_ones_are_taken_apart(dense, flash):
    """A list that is exact already, for one model or another, is not looked at twice."""
    processors = PROCESSORS["all"]
    twice = exact_processors(exact_processors(processors, flash_model()), flash)
    assert len(twice) == 1 and twice[0].processors == processors
    assert exact_processors(twice, dense) == processors
    assert run(flash, twice)[0] == run(dense, processors)[0]


def test_tokens_beyond_the_vocabulary(dense, flash):
    """As the placeholders of images are."""
    (ours,) = exact_processors([only(30)], flash)
    tokens = mx.array([7, 10**6, 2**31])
    found = ours(tokens, flash(mx.array([[1]]))[:, -1])
    assert mx.allclose(found, only(30)(tokens, dense(mx.array([[1]]))[:, -1]), atol=1e-3)


def test_nothing_is_evaluated(flash):
    """MLX refuses to evaluate within a transformation, so a second look that did would raise."""
    (ours,) = exact_processors(make_logits_processors(logit_bias={5: 99.0}), flash)

    @mx.compile
    def step(token):
        return ours(token[0], flash(token)[:, -1])

    assert mx.argmax(step(mx.array([[3]]))).item() == 5


def test_nothing_is_done_without_processors(dense, flash):
    head = get_flash_head(flash)
    gc.collect()
    assert exact_processors([], flash) == exact_processors(None, flash) == []
    assert head._watchers == ()
    processor = only(3)
    assert exact_processors([processor], dense) == [processor]
    kept = exact_processors([processor], flash)
    assert len(head._watchers) == 1
    del kept
    assert head._watchers == ()
