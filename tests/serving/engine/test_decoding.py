"""Sequences in a batch, and by themselves: each is generated as if it were alone."""

import mlx.core as mx
import pytest

from engines import CHUNK, LONG, NEVER_ENDS, SHORT, generated, submit, tokens_of, until
from mlx_flashhead.serving.engine.decoding import length_class
from mlx_flashhead.serving.engine.job import Token


def test_answers_are_what_the_package_generates(start, flash):
    engine = start()
    prompts = [SHORT, LONG, LONG[:100], [50]]
    jobs = {
        (i, n_probes): submit(engine, prompt, n_probes=n_probes)
        for i, prompt in enumerate(prompts)
        for n_probes in (4, 1)
    }
    for (i, n_probes), one in jobs.items():
        assert tokens_of(one) == generated(flash, prompts[i], n_probes=n_probes)


@pytest.mark.parametrize(
    "n_tokens, expected",
    [(1, 0), (1024, 0), (1025, 1), (4096, 1), (4097, 2), (16_384, 2), (16_385, 3)],
)
def test_classes_of_lengths(n_tokens, expected):
    assert length_class(n_tokens) == expected


def test_a_long_prompt_does_not_pad_the_caches_of_short_ones(start, flash):
    engine = start(context=4000)
    text = [LONG[i % 400] for i in range(1500)]
    long = submit(engine, text, 10_000, **NEVER_ENDS)
    until(long, Token)
    short = submit(engine, SHORT, 10_000, **NEVER_ENDS)
    until(short, Token)
    sizes = sorted(decoder.nbytes for decoder in engine._decoders)
    assert len(sizes) == 2 and 4 * sizes[0] < sizes[1]
    long.cancelled = short.cancelled = True


def test_seeds_repeat_whatever_else_is_drawn(start):
    engine = start()
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    alone = tokens_of(submit(engine, SHORT, **options))
    others = [submit(engine, SHORT, temperature=1.5, max_tokens=12) for _ in range(3)]
    others.append(submit(engine, SHORT, **options | {"seed": 8}))
    again = tokens_of(submit(engine, SHORT, **options))
    drawn = [tuple(tokens_of(other)) for other in others]
    assert again == alone
    assert len({tuple(alone), *drawn}) == 5


def test_processors_see_the_whole_sequence(start):
    engine = start()
    seen = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    tokens = tokens_of(submit(engine, LONG, 4, processors=[look]))
    assert seen[0] == LONG
    assert [*LONG, *tokens[:3]] in seen


def test_a_processor_that_leaves_the_end_token_ends_the_answer(start):
    engine = start()

    def end(tokens, logits):
        if len(tokens) < len(SHORT) + 2:
            return logits
        return mx.where(mx.arange(logits.shape[-1]) == 1, logits, -1e9)

    one = submit(engine, SHORT, 100, processors=[end])
    assert len(tokens_of(one)) == 2
    assert one.n_tokens == 3


@pytest.mark.parametrize("batched", [True, False])
def test_what_processors_leave_is_chosen_as_by_the_dense_model(start, drafting, batched):
    """Also where several sequences, of which each has processors of its own, are in one batch."""
    engine = start() if batched else drafting

    def only(ids):
        allowed = (mx.arange(258)[:, None] == mx.array(list(ids))).any(axis=-1)
        mx.eval(allowed)  # in this thread
        return lambda tokens, logits: mx.where(allowed, logits, -1e9)

    rules = [only(range(start, 250, 37)) for start in (40, 41, 42)]
    few = [submit(engine, SHORT, 12, processors=[rule], n_probes=1) for rule in rules]
    found = [tokens_of(one) for one in few]
    assert found == [
        tokens_of(submit(engine, SHORT, 12, processors=[rule], dense=True)) for rule in rules
    ]


def test_drafts_change_nothing_and_take_turns(drafting, flash):
    jobs = [submit(drafting, prompt, 12, n_probes=4) for prompt in (LONG, SHORT, LONG[:50])]
    for one, prompt in zip(jobs, (LONG, SHORT, LONG[:50]), strict=True):
        assert tokens_of(one) == generated(flash, prompt, 12)
    assert tokens_of(submit(drafting, SHORT, n_probes=1)) == generated(flash, SHORT, n_probes=1)


def test_a_cache_with_drafts_is_cut_where_it_ends(drafting, flash):
    """What follows an answer, or a cancelled one, is answered as without a cache."""
    first = submit(drafting, LONG[:60], 10)
    tokens = tokens_of(first)
    longer = [*LONG[:60], *tokens, 60, 61]
    one = submit(drafting, longer)
    assert tokens_of(one) == generated(flash, longer)
    assert one.cached >= 60
    cancelled = submit(drafting, LONG[:70], 10_000, **NEVER_ENDS)
    for _ in range(5):
        until(cancelled, Token)
    cancelled.cancelled = True
    longer = [*LONG[:70], 50, 50, 61]
    one = submit(drafting, longer)
    assert tokens_of(one) == generated(flash, longer)
    assert one.cached >= 70


def test_processors_see_the_whole_sequence_beside_drafts(drafting):
    seen = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    tokens = tokens_of(submit(drafting, SHORT, 6, processors=[look]))
    whole = [*SHORT, *tokens]
    assert all(tokens[: len(SHORT)] == SHORT for tokens in seen)
    assert any(tokens == whole[: len(tokens)] and len(tokens) > 4 for tokens in seen)


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
