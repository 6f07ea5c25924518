"""A step that fails costs the answer that caused it, and a swap of heads costs nothing."""

import pytest

from engines import LONG, SHORT, generated, job, submit, tokens_of, until
from mlx_flashhead.lossless.batch import CheckedBatchGenerator
from mlx_flashhead.lossless.sampler import make_sampler
from mlx_flashhead.serving.engine.decoding import Batch
from mlx_flashhead.serving.engine.job import Failure, Token
from mlx_flashhead.serving.engine.prompt_caches import PromptCaches

PROMPTS = [[*SHORT, i] for i in range(8)]


def test_seven_of_eight_answers_are_those_they_have_alone(start, flash):
    engine = start("--decode-concurrency", 8)
    calls = []

    def fails(logprobs):
        calls.append(0)
        if len(calls) > 3:
            raise RuntimeError("Resource limit (499000) exceeded")
        return logprobs.argmax(axis=-1)

    jobs = [job(engine, prompt, 12) for prompt in PROMPTS]
    jobs[3].sampler = fails
    engine.submit(jobs)
    assert "Resource limit" in str(_failure(jobs[3]))
    for i, other in enumerate(jobs):
        if i != 3:
            assert tokens_of(other) == generated(flash, PROMPTS[i], 12)
    assert engine.healthy
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)


def test_a_failure_of_nobody_in_particular_costs_nothing(start, flash, monkeypatch):
    engine = start("--decode-concurrency", 8)
    step, calls = CheckedBatchGenerator._next, []

    def failing(self):
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(CheckedBatchGenerator, "_next", failing)
    samplers = [make_sampler(temp=1.0, seed=i) for i in range(8)]
    jobs = [job(engine, prompt, 12) for prompt in PROMPTS]
    for one, sampler in zip(jobs, samplers, strict=True):
        one.sampler = sampler
    engine.submit(jobs)
    for one, prompt, sampler in zip(jobs, PROMPTS, samplers, strict=True):
        assert tokens_of(one) == generated(flash, prompt, 12, sampler=sampler)
    assert len(calls) >= 9


@pytest.mark.parametrize(
    "owner, name", [(PromptCaches, "keep"), (PromptCaches, "make_room"), (Batch, "remove")]
)
def test_what_fails_after_an_answer_fails_nobody(start, flash, monkeypatch, owner, name):
    engine = start()

    def fails(self, *arguments):
        raise RuntimeError("the store is full")

    monkeypatch.setattr(owner, name, fails)
    jobs = [submit(engine, prompt, n) for prompt, n in zip(PROMPTS[:3], (4, 12, 20), strict=True)]
    for one, prompt in zip(jobs, PROMPTS, strict=False):
        assert tokens_of(one) == generated(flash, prompt, one.max_tokens)
    assert engine.healthy


def _failure(one):
    while True:
        event = until(one, Failure | Token)
        if isinstance(event, Failure):
            return event.error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_nothing_ends_the_thread(start, flash, monkeypatch, error):
    engine = start()

    def fails():
        raise error

    monkeypatch.setattr(engine, "_read", fails)
    assert isinstance(_failure(submit(engine, SHORT)), type(error))
    monkeypatch.undo()
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)
    assert engine.healthy


def test_a_thread_that_does_not_come_back_is_not_healthy(start, monkeypatch):
    engine = start()
    assert engine.healthy
    monkeypatch.setattr("mlx_flashhead.serving.engine.engine.STUCK_SECONDS", -1.0)
    assert not engine.healthy


def test_answers_to_one_prompt_read_it_once(start, flash, chunks):
    engine = start()
    jobs = [job(engine, LONG, 4) for _ in range(6)]
    for one in jobs[1:]:
        one.prompt = jobs[0].prompt
    engine.submit(jobs)
    for one in jobs:
        assert tokens_of(one) == generated(flash, LONG, 4)
    assert {of for of, _ in chunks} == {jobs[0]}
    assert [one.cached for one in jobs] == [0, *[len(LONG) - 1] * 5]
