"""What fails costs the answer that caused it, and nothing else."""

import pytest
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from engines import SHORT, endless, generated, job, submit, tokens_of, until
from mlx_flashhead.lossless.batch import VerifiedBatchGenerator
from mlx_flashhead.lossless.sampler import make_sampler
from mlx_flashhead.serving.engine.decoding import Batch
from mlx_flashhead.serving.engine.jobs import Token
from mlx_flashhead.serving.engine.prefill import PromptCaches

PROMPTS = [[*SHORT, i] for i in range(8)]


@pytest.mark.parametrize("part", ["processor", "sampler"])
def test_seven_of_eight_answers_are_those_they_have_alone(engine, flash, part):
    jobs = [job(engine, prompt, 12) for prompt in PROMPTS]
    calls = []

    def fails(*arguments):
        calls.append(0)
        if len(calls) > 3:
            raise RuntimeError("Resource limit (499000) exceeded")
        return arguments[-1] if part == "processor" else arguments[-1].argmax(axis=-1)

    if part == "processor":
        jobs[3].processors.append(fails)
    else:
        jobs[3].sampler = fails
    engine.submit(jobs)
    assert "Resource limit" in str(until(jobs[3], BaseException))
    for i, other in enumerate(jobs):
        if i != 3:
            assert tokens_of(other) == generated(flash, PROMPTS[i], 12)
    assert engine.healthy
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)


def test_a_sampler_that_fails_does_not_spoil_the_draws_of_others(engine):
    """mlx-lm's refuses the threshold while MLX compiles it."""
    bad = job(engine, SHORT)
    bad.sampler = mlx_lm_sampler(temp=1.0, xtc_probability=1.0, xtc_threshold=0.9)
    engine.submit([bad])
    assert "threshold" in str(until(bad, BaseException | Token))
    assert len(tokens_of(submit(engine, SHORT, temperature=1.0))) > 0


def test_a_failure_of_nobody_in_particular_costs_nothing(engine, flash, monkeypatch):
    step, calls = VerifiedBatchGenerator._next, []

    def failing(self):
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(VerifiedBatchGenerator, "_next", failing)
    samplers = [make_sampler(temp=1.0, seed=i) for i in range(8)]
    jobs = [job(engine, prompt, 12) for prompt in PROMPTS]
    for one, sampler in zip(jobs, samplers, strict=True):
        one.sampler = sampler
    engine.submit(jobs)
    for one, prompt, sampler in zip(jobs, PROMPTS, samplers, strict=True):
        assert tokens_of(one) == generated(flash, prompt, 12, sampler=sampler)
    assert len(calls) >= 9


@pytest.mark.parametrize("owner, name", [(PromptCaches, "keep"), (Batch, "remove")])
def test_what_fails_after_an_answer_fails_nobody(engine, flash, monkeypatch, owner, name):
    def fails(self, *arguments, **options):
        raise RuntimeError("the store is full")

    monkeypatch.setattr(owner, name, fails)
    jobs = [submit(engine, prompt, n) for prompt, n in zip(PROMPTS[:3], (4, 12, 20), strict=True)]
    for one, prompt in zip(jobs, PROMPTS, strict=False):
        assert tokens_of(one) == generated(flash, prompt, one.max_tokens)
    assert engine.healthy


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ZeroDivisionError()])
def test_nothing_ends_the_thread_and_all_are_told(engine, flash, monkeypatch, error):
    one = endless(engine, SHORT)

    def fails():
        raise error

    monkeypatch.setattr(engine, "_read", fails)
    assert until(one, BaseException) is error
    monkeypatch.undo()
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)
    assert engine.healthy
