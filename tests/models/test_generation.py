"""Generation: mlx-lm's own loops under settings that last as long as the call."""

from itertools import zip_longest

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_flashhead import batch_generate, convert, generate, get_flash_head, load, stream_generate
from model_folders import VOCAB_SIZE, write_model

PROMPTS = ("One day", "How do I bake bread?", "x")
TOKENS = 16


@pytest.fixture(scope="module", params=["tied", "untied"])
def folders(request, tmp_path_factory):
    """``(dense, converted)`` folders of a tiny model, with few probes."""
    folder = tmp_path_factory.mktemp(request.param)
    tied = request.param == "tied"
    dense = write_model(folder / "dense", tied=tied, hidden_size=128, seed=4)
    convert(str(dense), str(folder / "converted"), n_probes=4, calibration="none", progress=False)
    return dense, folder / "converted"


@pytest.fixture(scope="module")
def flash(folders):
    """``(model, tokenizer)`` with a FlashHead."""
    return load(str(folders[1]))


@pytest.fixture(scope="module")
def dense(folders):
    """``(model, tokenizer)`` before conversion."""
    return mlx_lm.load(str(folders[0]))


@pytest.fixture
def head(flash):
    """The FlashHead, which each test must leave as it was."""
    head = get_flash_head(flash[0])
    yield head
    assert state(head) == (4, None)


def state(head):
    return head.n_probes, head._draw_temperature


def dense_text(model, tokenizer, prompt):
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_dense_is_mlx_lms_text(flash, dense, head, prompt):
    found = generate(*flash, prompt, dense=True, max_tokens=TOKENS)
    assert found == dense_text(*dense, prompt)
    streamed = stream_generate(*flash, prompt, dense=True, max_tokens=TOKENS)
    assert "".join(response.text for response in streamed) == found
    assert generate(*flash, prompt, n_probes=head.n_clusters, max_tokens=TOKENS) == found


@pytest.mark.parametrize("prompt", PROMPTS)
def test_n_probes_is_that_of_the_call(flash, head, prompt):
    found = generate(*flash, prompt, n_probes=1, max_tokens=TOKENS)
    head.n_probes = 1
    expected = mlx_lm.generate(*flash, prompt, max_tokens=TOKENS)
    head.n_probes = 4
    assert found == expected
    streamed = stream_generate(*flash, prompt, n_probes=1, max_tokens=TOKENS)
    assert "".join(response.text for response in streamed) == expected
    usual = mlx_lm.generate(*flash, prompt, max_tokens=TOKENS)
    assert generate(*flash, prompt, max_tokens=TOKENS) == usual != expected


def test_fewer_probes_score_fewer_tokens(flash, head):
    """The tail of a cluster is one value for all its tokens, so logits repeat."""
    for n_probes in (1, 4):
        (first, *_) = stream_generate(*flash, "One day", n_probes=n_probes, max_tokens=1)
        distinct = len(np.unique(np.array(first.logprobs)))
        assert distinct <= n_probes * head.cluster_size + head.n_clusters - n_probes
    (first, *_) = stream_generate(*flash, "One day", dense=True, max_tokens=1)
    assert len(np.unique(np.array(first.logprobs))) > VOCAB_SIZE * 0.9


def test_mlx_lms_keywords_arrive(flash, head, capsys):
    seen = []

    def record(tokens, logits):
        seen.append(logits.shape)
        return logits

    processors = [record, *make_logits_processors(logit_bias={7: 1e6})]
    for response in stream_generate(
        *flash,
        "One day",
        max_tokens=3,
        sampler=make_sampler(temp=0.8, top_k=5),
        logits_processors=processors,
    ):
        assert response.token == 7
    assert set(seen) == {(1, VOCAB_SIZE)} and len(seen) >= 3
    text = generate(*flash, "One day", max_tokens=3, verbose=True)
    printed = capsys.readouterr().out
    assert text in printed and "tokens-per-sec" in printed


def test_drawn_probes_are_all_that_can_be_sampled(flash, head):
    mx.random.seed(1)
    sampler = make_sampler(temp=1.0)
    drawn = []
    for response in stream_generate(
        *flash, "One day", n_probes=2, draw_temperature=1.0, sampler=sampler, max_tokens=8
    ):
        possible = np.flatnonzero(np.array(response.logprobs) > -5000)
        assert len(possible) <= 2 * head.cluster_size
        assert response.token in possible
        drawn.append(tuple(possible))
    assert len(set(drawn)) > 1
    for response in stream_generate(*flash, "One day", n_probes=2, sampler=sampler, max_tokens=8):
        assert (np.array(response.logprobs) > -5000).all()


def test_settings_end_with_an_error(flash, head):
    def failing(logprobs):
        raise RuntimeError("in the sampler")

    options = {"n_probes": 2, "draw_temperature": 1.0, "sampler": failing}
    with pytest.raises(RuntimeError, match="in the sampler"):
        generate(*flash, "One day", **options)
    with pytest.raises(RuntimeError, match="in the sampler"):
        next(stream_generate(*flash, "One day", **options))
    with pytest.raises(RuntimeError, match="in the sampler"):
        batch_generate(*flash, [[5, 6]], **options)
    with pytest.raises(TypeError):
        generate(*flash, "One day", dense=True, no_such_keyword=1)


def test_settings_end_with_an_abandoned_stream(flash, head):
    stream = stream_generate(*flash, "One day", n_probes=2, draw_temperature=1.0, max_tokens=50)
    next(stream)
    assert state(head) == (4, None)
    stream.close()


def test_streams_take_turns(flash, head):
    """Each has its own settings, whichever starts or ends first."""
    settings = ({"n_probes": 1}, {"dense": True}, {})
    expected = [generate(*flash, "One day", max_tokens=9, **options) for options in settings]
    assert len(set(expected)) == 3
    streams = [stream_generate(*flash, "One day", max_tokens=9, **o) for o in settings]
    texts = ["", "", ""]
    for responses in zip_longest(*streams):
        for i, response in enumerate(responses):
            texts[i] += response.text if response else ""
    assert texts == expected


@pytest.mark.parametrize("options", [{}, {"n_probes": 1}, {"dense": True}])
def test_batch_of_three(flash, head, options):
    tokenizer = flash[1]
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    batch = batch_generate(*flash, prompts, max_tokens=TOKENS, **options)
    for prompt, text in zip(prompts, batch.texts, strict=True):
        responses = list(stream_generate(*flash, prompt, max_tokens=TOKENS, **options))
        tokens = [r.token for r in responses if r.token not in tokenizer.eos_token_ids]
        assert text == tokenizer.decode(tokens)


def test_dense_batch_is_mlx_lms(flash, dense, head):
    prompts = [flash[1].encode(prompt) for prompt in PROMPTS]
    expected = mlx_lm.batch_generate(*dense, prompts, max_tokens=TOKENS)
    found = batch_generate(*flash, prompts, dense=True, max_tokens=TOKENS)
    assert found.texts == expected.texts


def test_draft_model(flash, dense, head):
    """Several positions at once, of which some are rejected."""
    expected = generate(*flash, "One day", max_tokens=TOKENS)
    found = generate(*flash, "One day", max_tokens=TOKENS, draft_model=dense[0])
    assert found == expected


def test_dense_models_generate_as_they_are(dense):
    expected = dense_text(*dense, "One day")
    assert generate(*dense, "One day", max_tokens=TOKENS) == expected
    assert generate(*dense, "One day", dense=True, max_tokens=TOKENS) == expected
    for options in ({"n_probes": 1}, {"draw_temperature": 1.0}):
        with pytest.raises(ValueError, match="has no FlashHead"):
            generate(*dense, "One day", max_tokens=TOKENS, **options)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"n_probes": 0}, "n_probes is 0"),
        ({"n_probes": 18}, "choose 1 to 17"),
        ({"n_probes": 1.5}, "whole number"),
        ({"n_probes": 2, "draw_temperature": 0.0}, "must be above 0"),
    ],
)
def test_settings_that_are_not_valid(flash, head, options, said):
    with pytest.raises(ValueError, match=said):
        generate(*flash, "One day", **options)
    with pytest.raises(ValueError, match=said):
        next(stream_generate(*flash, "One day", **options))


def test_several_models_have_settings_of_their_own(flash, head, folders):
    other_model, _ = load(str(folders[1]), n_probes=7)
    other = get_flash_head(other_model)
    stream = stream_generate(*flash, "One day", n_probes=2, max_tokens=2)
    others = []
    with other.dense():
        for response in stream:
            others.append(state(other))
            assert response.token >= 0 and state(head) == (4, None)
    assert others == [(other.n_clusters, None)] * 2
    assert state(other) == (7, None)
