"""Sequences in a batch, and by themselves: each is generated as if it were alone."""

import pytest

from engines import CHUNK, LONG, SHORT, endless, generated, submit, tokens_of, until
from mlx_flashhead import grammar_processor
from mlx_flashhead.serving.jobs import Token


@pytest.fixture(params=["engine", "drafting"])
def either(request):
    """An engine that decodes batches, or one sequence after another with drafts."""
    return request.getfixturevalue(request.param)


def test_answers_are_what_the_package_generates(either, flash):
    """In batches of one setting, several settings at once."""
    prompts = [SHORT, LONG, LONG[:100], [50]]
    settings = [{}, {"n_probes": 1}, {"dense": True}]
    asked = [(prompt, setting) for prompt in prompts for setting in settings]
    jobs = [submit(either, prompt, **setting) for prompt, setting in asked]
    for one, (prompt, setting) in zip(jobs, asked, strict=True):
        assert tokens_of(one) == generated(flash, prompt, **setting)


def test_a_long_prompt_does_not_pad_the_caches_of_short_ones(start):
    engine = start()
    text = [LONG[i % 400] for i in range(1100)]  # beyond the 1,024 of a first class
    long, short = endless(engine, text), endless(engine, SHORT)
    sizes = sorted(decoder.nbytes for decoder in engine._decoders)
    assert len(sizes) == 2 and 4 * sizes[0] < sizes[1]
    long.cancelled = short.cancelled = True


def test_seeds_repeat_whatever_else_is_drawn(engine):
    options = {"temperature": 1.5, "seed": -7, "max_tokens": 12}
    alone = tokens_of(submit(engine, SHORT, **options))
    others = [submit(engine, SHORT, temperature=1.5, max_tokens=12) for _ in range(3)]
    others.append(submit(engine, SHORT, **options | {"seed": 8}))
    again = tokens_of(submit(engine, SHORT, **options))
    drawn = [tuple(tokens_of(other)) for other in others]
    assert again == alone
    assert len({tuple(alone), *drawn}) == 5


def test_processors_see_the_whole_sequence(either):
    seen = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    whole = [*LONG, *tokens_of(submit(either, LONG, 6, processors=[look]))]
    assert seen[0] == LONG
    assert all(tokens[: len(LONG)] == LONG for tokens in seen)
    assert any(tokens == whole[: len(tokens)] and len(tokens) > 402 for tokens in seen)


def test_texts_of_a_form_are_the_dense_models(either, flash):
    """A grammar follows what is drafted, and goes back. Each of a batch has its own."""

    def texts(**settings):
        rules = [grammar_processor(flash[1], regex=regex) for regex in ("[0-9]{5}", "(ab|cd){4}")]
        jobs = [submit(either, SHORT, 20, processors=[rule], **settings) for rule in rules]
        return [flash[1].decode(tokens_of(one)) for one in jobs]

    first, second = texts(n_probes=1)
    assert first.isdecimal() and len(first) == 5 and set(second) <= set("abcd") and len(second) == 8
    assert texts(dense=True) == [first, second]


def test_a_cache_with_drafts_is_cut_where_it_ends(drafting, flash):
    """What follows an answer, or a cancelled one, is answered as without a cache."""
    first = submit(drafting, LONG[:60], 10)
    tokens = tokens_of(first)
    longer = [*LONG[:60], *tokens, 60, 61]
    one = submit(drafting, longer)
    assert tokens_of(one) == generated(flash, longer)
    assert one.cached >= 60
    cancelled = endless(drafting, LONG[:70])
    for _ in range(4):
        until(cancelled, Token)
    cancelled.cancelled = True
    longer = [*LONG[:70], 50, 50, 61]
    one = submit(drafting, longer)
    assert tokens_of(one) == generated(flash, longer)
    assert one.cached >= 70


def test_quantized_caches(start, flash):
    engine = start("--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 20)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    options |= {"prefill_step_size": CHUNK}
    jobs = [submit(engine, prompt) for prompt in (LONG, SHORT)]
    for one, prompt in zip(jobs, (LONG, SHORT), strict=True):
        assert tokens_of(one) == generated(flash, prompt, **options)
    again = submit(engine, LONG)
    assert len(tokens_of(again)) == 8
    assert again.cached == 399
