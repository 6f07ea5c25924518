"""The generating thread: turns of prompts and answers, cancelling at any moment, its end."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

from engines import CHUNK, LONG, SHORT, endless, submit, tokens_of, until
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.serving import engine as engine_module
from mlx_flashhead.serving.answer_text import PromptProgress, Token
from mlx_flashhead.serving.stages import Reading


def test_a_cancelled_prompt_is_read_no_further_and_stays_cached(start, chunks):
    engine = start("--decode-concurrency", 2)
    one = submit(engine, LONG)
    until(one, PromptProgress)
    answer = endless(engine, SHORT)
    # It is in the queue, and never begun.
    waiting = submit(engine, LONG[1:])
    for each in (one, waiting, answer):
        each.ended = True
    tokens_of(submit(engine, SHORT))
    n_read = len(chunks)
    other = submit(engine, LONG)
    assert len(tokens_of(other)) == 8
    assert other.cached >= CHUNK
    assert sum(of is one for of, _ in chunks) < len(LONG) // CHUNK
    assert {of for of, _ in chunks[n_read:]} == {other} and waiting not in dict(chunks)


def test_a_cancelled_answer_ends_and_its_cache_stays(start):
    engine = start()
    one = endless(engine, LONG)
    other = endless(engine, SHORT)
    one.ended = True
    assert len(tokens_of(submit(engine, [50]))) == 8
    before = len(one.tokens), len(other.tokens)
    assert len(tokens_of(submit(engine, [51]))) == 8
    assert len(one.tokens) == before[0] and len(other.tokens) > before[1]
    other.ended = True
    again = submit(engine, LONG)
    assert len(tokens_of(again)) == 8
    assert again.cached == 399


def test_neither_a_short_question_nor_an_answer_waits_for_a_long_prompt(start, chunks):
    engine = start()
    answer = endless(engine, [*SHORT, 50])
    long = submit(engine, LONG)
    until(long, PromptProgress)
    before = len(answer.tokens)
    assert len(tokens_of(submit(engine, SHORT))) == 8
    assert sum(size for of, size in chunks if of is long) < 399
    until(long, Token)
    # half of the time is the answers'
    assert len(answer.tokens) - before > len(chunks) / 2
    answer.ended = True


def test_a_prompt_is_read_soon_beside_slow_answers_and_a_stream_of_short_prompts(
    start, monkeypatch, chunks
):
    """As the engine sees it, a chunk takes 0.1 s, and a token of all answers 1 s."""
    seconds = []
    n_steps = []
    compute = Reading._compute
    step = VerifiedBatchGenerator.next

    def computed(self, tokens):
        seconds.append(0.1)
        compute(self, tokens)

    def stepped(self):
        seconds.append(1)
        n_steps.append(0)
        return step(self)

    clock = SimpleNamespace(perf_counter=lambda: sum(seconds), monotonic=time.monotonic)
    monkeypatch.setattr(Reading, "_compute", computed)
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
            # Ten chunks take about five steps.
            assert len(n_steps) - n_before < 12
        finally:
            ended.set()
            for one in answers:
                one.ended = True
    assert not any(asker.exception() for asker in askers)
