"""The generating thread: turns of prompts and answers, cancelling at any moment, its end."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from engines import CHUNK, LONG, SHORT, endless, job, submit, tokens_of, until
from mlx_flashhead.lossless.batch import VerifiedBatchGenerator
from mlx_flashhead.serving import engine as engine_module
from mlx_flashhead.serving import prefill
from mlx_flashhead.serving.engine import time_for_answers
from mlx_flashhead.serving.jobs import Progress, Token


def test_a_cancelled_prompt_is_not_read_on_and_what_was_read_is_kept(start, chunks):
    engine = start()
    one = submit(engine, LONG)
    until(one, Progress)
    one.cancelled = True
    tokens_of(submit(engine, SHORT))
    n_read = len(chunks)
    other = submit(engine, LONG)
    assert len(tokens_of(other)) == 8
    assert other.cached >= CHUNK
    assert n_read < len(LONG) // CHUNK and {of for of, _ in chunks[n_read:]} == {other}


def test_a_cancelled_job_in_the_queue_is_never_begun(start, chunks):
    engine = start("--decode-concurrency", 1)
    first = endless(engine, SHORT)
    waiting = submit(engine, LONG)
    waiting.cancelled = first.cancelled = True
    assert len(tokens_of(submit(engine, SHORT))) == 8
    assert waiting not in {of for of, _ in chunks}


def test_a_cancelled_answer_ends_and_its_cache_is_kept(start):
    engine = start()
    one, other = endless(engine, LONG), endless(engine, SHORT)
    one.cancelled = True
    assert len(tokens_of(submit(engine, [50]))) == 8
    n_tokens, n_rejected = len(one.tokens), len(other.tokens)
    assert len(tokens_of(submit(engine, [51]))) == 8
    assert len(one.tokens) == n_tokens and len(other.tokens) > n_rejected
    other.cancelled = True
    again = submit(engine, LONG)
    assert len(tokens_of(again)) == 8
    assert again.cached == 399


def test_a_short_question_does_not_wait_for_a_long_prompt(start, chunks):
    engine = start()
    long = submit(engine, LONG)
    until(long, Progress)
    assert len(tokens_of(submit(engine, SHORT))) == 8
    assert sum(size for of, size in chunks if of is long) < 399
    assert len(tokens_of(long)) == 8


def test_answers_go_on_while_a_prompt_is_read(start, chunks):
    engine = start()
    answer = endless(engine, SHORT)
    long = submit(engine, LONG)
    until(long, Progress)
    before = len(answer.tokens)
    until(long, Token)
    # half of the time is the answer's
    assert len(answer.tokens) - before > len(chunks)
    answer.cancelled = True


@pytest.mark.parametrize(
    "n_answers, n_prompts, expected", [(1, 1, 1), (8, 1, 1), (1, 4, 0.25), (5, 0, 1), (0, 3, 0)]
)
def test_a_burst_of_prompts_is_read_before_few_answers_go_on(n_answers, n_prompts, expected):
    assert time_for_answers(n_answers, n_prompts) == expected


class Clock:
    """Time as the engine sees it: a chunk takes 0.1 s, a token of all answers 1 s."""

    now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = staticmethod(time.monotonic)


def test_a_prompt_is_read_soon_beside_slow_answers_and_a_stream_of_short_prompts(
    start, monkeypatch, chunks
):
    clock, n_steps = Clock(), []
    compute, step = prefill.Reading._compute, VerifiedBatchGenerator.next

    def computed(self, tokens):
        clock.now += 0.1
        compute(self, tokens)

    def stepped(self):
        clock.now += 1
        n_steps.append(0)
        return step(self)

    monkeypatch.setattr(prefill.Reading, "_compute", computed)
    monkeypatch.setattr(VerifiedBatchGenerator, "next", stepped)
    monkeypatch.setattr(engine_module, "time", clock)
    engine = start()
    answers = [endless(engine, [*SHORT, i]) for i in range(8)]
    ended = Event()

    def ask(i):
        while not ended.is_set():
            tokens_of(submit(engine, [50 + i, *SHORT, len(chunks) % 200], 1))

    with ThreadPoolExecutor(8) as pool:
        askers = [pool.submit(ask, i) for i in range(8)]
        n_before = len(n_steps)
        try:
            until(submit(engine, LONG[: 10 * CHUNK + 1]), Token)
            assert len(n_steps) - n_before < 12  # about 5 for ten chunks
        finally:
            ended.set()
            for one in answers:
                one.cancelled = True
    assert not any(asker.exception() for asker in askers)


class ScriptedReading:
    def __init__(self, left):
        self.left = left

    def read(self, pace):
        self.left -= min(self.left, CHUNK)


def test_whose_chunk_is_next():
    """A short prompt always waits. It neither holds up the others, nor do they hold it up."""
    queue, order, shorts = prefill.ReadingQueue(), [], []
    long, middling = ScriptedReading(600), ScriptedReading(160)
    queue.add(long)
    queue.add(middling)
    while long.left:
        if not shorts or not shorts[-1].left:
            shorts.append(ScriptedReading(3))
            queue.add(shorts[-1])
        order.append(queue.next())
        queue.read(order[-1], None)
        if not order[-1].left:
            queue.remove(order[-1])
    # due after as many tokens as it has, and then every other chunk is its own
    last = len(order) - order[::-1].index(middling)
    assert order[:last].count(middling) == 10 and last <= 2 * 10 + 160 / 3
    assert len(order) <= 2 * (10 + 38) + 600 / 3
    assert all(order[i] in shorts or order[i + 1] in shorts for i in range(len(order) - 1))


def test_answers_to_one_prompt_read_it_once(start, chunks):
    engine = start()
    jobs = [job(engine, LONG, 4) for _ in range(6)]
    for one in jobs[1:]:
        one.prompt = jobs[0].prompt
    engine.submit(jobs)
    assert len({tuple(tokens_of(one)) for one in jobs}) == 1
    assert {of for of, _ in chunks} == {jobs[0]}
    assert [one.cached for one in jobs] == [0, *[len(LONG) - 1] * 5]
