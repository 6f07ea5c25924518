"""The generating thread: turns of prompts and answers, cancelling at any moment, failures."""

import threading
import time

import pytest
from mlx_lm.sample_utils import make_sampler

from engines import (
    CHUNK,
    LONG,
    NEVER_ENDS,
    SHORT,
    generated,
    job,
    running,
    submit,
    tokens_of,
    until,
)
from mlx_flashhead.serving.catalogue import Catalogue
from mlx_flashhead.serving.engine.engine import Engine, time_for_answers
from mlx_flashhead.serving.engine.job import Failure, Progress, Token
from served_models import flags, served_model


def test_a_cancelled_prompt_is_not_read_on_and_what_was_read_is_kept(start, chunks):
    engine = start()
    one = submit(engine, LONG)
    until(one, Progress)
    one.cancelled = True
    time.sleep(0.2)
    n_read = len(chunks)
    assert n_read < 20
    other = submit(engine, LONG)
    assert len(tokens_of(other)) == 8
    assert other.cached >= CHUNK
    assert {of for of, _ in chunks[n_read:]} == {other}


def test_a_cancelled_job_in_the_queue_is_never_begun(start, chunks):
    engine = start("--decode-concurrency", 1)
    first = submit(engine, SHORT, 10_000, **NEVER_ENDS)
    until(first, Token)
    waiting = submit(engine, LONG)
    time.sleep(0.05)
    waiting.cancelled = first.cancelled = True
    assert len(tokens_of(submit(engine, SHORT))) == 8
    assert waiting not in {of for of, _ in chunks}


def test_a_cancelled_answer_ends_and_its_cache_is_kept(start):
    engine = start()
    one = submit(engine, LONG, 10_000, **NEVER_ENDS)
    other = submit(engine, SHORT, 10_000, **NEVER_ENDS)
    for _ in range(3):
        until(one, Token)
    one.cancelled = True
    time.sleep(0.2)
    n_tokens = one.n_tokens
    until(other, Token)
    time.sleep(0.05)
    assert one.n_tokens == n_tokens
    assert other.n_tokens > 3
    other.cancelled = True
    again = submit(engine, LONG)
    assert len(tokens_of(again)) == 8
    assert again.cached == 399


def test_a_short_question_does_not_wait_for_a_long_prompt(start, chunks):
    engine = start()
    long = submit(engine, LONG)
    until(long, Progress)
    short = submit(engine, SHORT)
    assert len(tokens_of(short)) == 8
    read_by_then = sum(size for of, size in chunks if of is long)
    assert read_by_then < 399
    assert len(tokens_of(long)) == 8


def test_answers_go_on_while_a_prompt_is_read(start, chunks):
    engine = start()
    answer = submit(engine, SHORT, 10_000, **NEVER_ENDS)
    until(answer, Token)
    long = submit(engine, LONG)
    until(long, Progress)
    before = answer.n_tokens
    until(long, Token)
    # half of the time is the answer's
    assert answer.n_tokens - before > len(chunks)
    answer.cancelled = True


@pytest.mark.parametrize(
    "n_answers, n_prompts, expected", [(1, 1, 1), (8, 1, 1), (1, 4, 0.25), (5, 0, 1), (0, 3, 0)]
)
def test_a_burst_of_prompts_is_read_before_few_answers_go_on(n_answers, n_prompts, expected):
    assert time_for_answers(n_answers, n_prompts) == expected


def test_long_prompts_are_not_starved_by_short_ones(start, chunks):
    engine = start()
    long = submit(engine, LONG)
    ended = threading.Event()

    def ask():
        while not ended.is_set():
            tokens_of(submit(engine, [50 + len(chunks) % 100, *SHORT], 1))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        assert len(tokens_of(long)) == 8
    finally:
        ended.set()
        for asker in askers:
            asker.join()


def test_a_failure_ends_the_answer_and_nothing_else(start, flash):
    engine = start()

    def fails(tokens, logits):
        raise RuntimeError("of this sequence")

    good = submit(engine, SHORT, 10_000, **NEVER_ENDS)
    until(good, Token)
    bad = submit(engine, SHORT, processors=[fails])
    assert "of this sequence" in str(until(bad, Failure | Token).error)
    n_tokens = good.n_tokens
    until(good, Token)  # it is in the same batch
    while good.n_tokens <= n_tokens:
        until(good, Token)
    good.cancelled = True
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)
    assert engine.healthy


def test_a_sampler_that_fails_does_not_spoil_the_draws_of_others(start):
    """mlx-lm's refuses the threshold while MLX compiles it."""
    engine = start()
    bad = job(engine, SHORT)
    bad.sampler = make_sampler(temp=1.0, xtc_probability=1.0, xtc_threshold=0.9)
    engine.submit([bad])
    assert "threshold" in str(until(bad, Failure | Token).error)
    assert len(tokens_of(submit(engine, SHORT, temperature=1.0))) > 0


def test_a_failure_of_the_loop_itself_is_told_to_all(start, flash, monkeypatch):
    engine = start()
    one = submit(engine, SHORT, 10_000, **NEVER_ENDS)
    until(one, Token)
    monkeypatch.setattr(engine, "_read", lambda: 1 / 0)
    assert isinstance(until(one, Failure).error, ZeroDivisionError)
    monkeypatch.undo()
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)


def test_a_model_that_cannot_be_loaded_is_told():
    def load():
        raise ValueError("no such model")

    engine = Engine(load, flags())
    with pytest.raises(ValueError, match="no such model"):
        engine.catalogue.result(20)
    assert engine.close(20)


def test_it_closes_amid_work(random_model):
    def load():
        return Catalogue([served_model(random_model / "flash")])

    engine = running(load)
    until(submit(engine, SHORT, 10_000, **NEVER_ENDS), Token)
    submit(engine, LONG)
    assert engine.close(20)
    assert not engine.healthy
