"""What fails costs the answer that caused it, and nothing else."""

import sys
from itertools import count
from threading import Event

import pytest

from engines import SHORT, flags, generated, job, submit, tokens_of, until
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.sampling import make_sampler
from mlx_flashhead.models.compat.mlx_lm import LRUPromptCache
from mlx_flashhead.serving.answer_text import AnswerText
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.jobs import Job
from mlx_flashhead.serving.stages import Batch, Reading

NUMBERS = count()
PROMPTS = [[*SHORT, i] for i in range(8)]


@pytest.mark.parametrize("part", ["processor", "sampler"])
def test_seven_of_eight_answers_are_those_they_have_alone(engine, flash, part):
    jobs = [job(engine, prompt, 12) for prompt in PROMPTS]
    calls = count()

    def fail_at_the_fourth():
        if next(calls) >= 3:
            raise RuntimeError("Resource limit (499000) exceeded")

    def process(tokens, logits):
        fail_at_the_fourth()
        return logits

    def sample(logprobs):
        fail_at_the_fourth()
        return logprobs.argmax(axis=-1)

    failing = jobs[3]
    if part == "processor":
        failing.processors.append(process)
    else:
        failing.sampler = sample
    engine.submit(jobs)
    assert "Resource limit" in str(until(failing, BaseException))
    for other, prompt in zip(jobs, PROMPTS, strict=True):
        if other is not failing:
            assert tokens_of(other) == generated(flash, prompt, 12)
    assert engine.status == "ok"
    assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)


def test_a_failure_of_nobody_in_particular_costs_nothing(engine, flash, monkeypatch):
    step = VerifiedBatchGenerator._next
    calls = count()

    def failing(self):
        if next(calls) == 8:
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
    assert next(calls) > 8


class PanicError(BaseException):
    """As a library in Rust raises, which no handler of Exception catches."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "owner, names",
    [
        (
            Engine,
            "_receive _admit _take_out _read _begin _decode _store _take_built _take_turns",
        ),
        (LRUPromptCache, "fetch_nearest_cache insert_cache"),
        (Reading, "__init__ read _compute"),
        (Batch, "__init__ add step remove"),
        (VerifiedBatchGenerator, "insert next remove"),
        (Job, "take emit"),
        (AnswerText, "add"),
    ],
)
def test_what_fails_once_costs_one_answer_at_most(engine, flash, monkeypatch, owner, names, after):
    for name in names.split():
        function = getattr(owner, name)
        failed = []
        # No cache holds prompts with another number.
        first = next(NUMBERS)
        prompts = [[*SHORT, first // 200, first % 200, i] for i in range(3)]
        jobs = [job(engine, prompt, n) for prompt, n in zip(prompts, (2, 6, 4), strict=True)]

        def fails(*arguments, name=name, function=function, failed=failed, **options):
            # An idle engine calls some of these, too.
            if failed or (owner is Engine and name != "_begin" and not engine._busy):
                return function(*arguments, **options)
            if after:
                function(*arguments, **options)
            failed.append(0)
            raise PanicError("out of luck")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            engine.submit(jobs)
            lost = 0
            for one, prompt in zip(jobs, prompts, strict=True):
                try:
                    assert tokens_of(one) == generated(flash, prompt, one.max_tokens)
                except PanicError:
                    lost += 1
            assert failed and lost <= 1, name
            assert tokens_of(submit(engine, SHORT)) == generated(flash, SHORT)
            assert engine.status == "ok" and not engine._begun


def test_an_engine_whose_answers_all_fail_says_so(start, monkeypatch):
    engine = start()
    monkeypatch.setattr(Reading, "_compute", lambda *_: 1 / 0)
    for status in ("ok", "ok", "failing", "failing"):
        until(submit(engine, SHORT), ZeroDivisionError)
        assert engine.status == status
    monkeypatch.undo()
    assert len(tokens_of(submit(engine, SHORT))) == 8
    assert engine.status == "ok"


def test_an_engine_that_still_loads_and_one_that_cannot():
    go_on = Event()

    def load():
        assert go_on.wait(20)
        sys.exit("no such model")

    engine = Engine(load, flags())
    assert engine.status == "loading"
    go_on.set()
    with pytest.raises(SystemExit, match="no such model"):
        engine.models.result(60)
    assert engine.close(60)
