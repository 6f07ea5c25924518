"""Answers at once: addresses share them while others wait, and each of their n is counted."""

import json
from collections import Counter
from contextlib import ExitStack
from http.client import HTTPConnection
from threading import Event

import pytest

from engines import SHORT, flags, generated, job, submit, tokens_of, until
from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.answer_text import Token
from mlx_flashhead.serving.endpoints import Api
from mlx_flashhead.serving.serve import Server
from mlx_flashhead.serving.stages import Batch
from scripted_server import running

# An engine answers so many at once by default.
PLACES = 32
# An address has so many of them where there are two.
SHARE = 11
ENDLESS = {"prompt": "x", "max_tokens": 400, "logit_bias": {"50": 100}}


def addressed(jobs, address):
    for one in jobs:
        one.address = address
    return jobs


def many(engine, address, number, **fields):
    """As many endless answers of an address."""
    fields = {"max_tokens": 10_000, "logit_bias": {"50": 100}} | fields
    return addressed([job(engine, [*SHORT, i], **fields) for i in range(number)], address)


def wait_until_begun(one):
    until(one, Token)


def stop(engine, jobs):
    for one in jobs:
        one.ended = True
    tokens_of(submit(engine, SHORT))


@pytest.fixture
def send(start):
    """A function that sends a request of an address, (address, fields) → the connection."""
    engine = start()
    router = Api(flags(), engine).router()

    async def from_address(scope, receive, send):
        scope["client"] = (dict(scope["headers"])[b"x-address"].decode(), 1)
        await router(scope, receive, send)

    with running(Server(from_address, Access())) as port, ExitStack() as opened:

        def send(address, **fields):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            opened.callback(connection.close)
            connection.request(
                "POST", "/v1/completions", json.dumps(fields), {"X-Address": address}
            )
            return connection

        send.engine = engine
        yield send


def test_two_requests_of_16_do_not_keep_another_address_out(send):
    """The program that starved it: its streams have begun, and hold every place."""
    greedy = [send("a", n=16, stream=True, **ENDLESS).getresponse() for _ in range(2)]
    for response in greedy:
        seen = set()
        while len(seen) < 16:
            line = response.readline()
            if line.startswith(b"data: "):
                seen |= {choice["index"] for choice in json.loads(line[6:])["choices"]}
    small = send("b", prompt="Hi", max_tokens=4).getresponse()
    assert json.loads(small.read())["usage"]["completion_tokens"] == 4
    # They go on, and each of their answers ends as it would have.
    for response in greedy:
        ends = [line for line in response if b'"finish_reason": "length"' in line]
        assert len(ends) == 16
    assert send.engine.status == "ok" and all(one.ended for one in send.engine._begun)


def test_who_comes_takes_the_place_of_an_answer_beyond_a_share(start):
    engine = start()
    greedy = many(engine, "a", PLACES)
    engine.submit(greedy)
    for one in greedy:
        wait_until_begun(one)
    # All of them answer while nobody else waits.
    assert len(engine._begun) == PLACES
    others = many(engine, "b", PLACES)
    engine.submit(others)
    for one in others[:SHARE]:
        wait_until_begun(one)
    assert sum(one in engine._begun for one in greedy) <= PLACES - SHARE
    assert sum(one in engine._begun for one in others) == SHARE
    third = addressed([job(engine, SHORT)], "c")
    engine.submit(third)
    assert len(tokens_of(third[0])) == 8
    assert not any(one.ended for one in (*greedy, *others))
    stop(engine, [*greedy, *others])


def test_three_addresses_leave_a_place_for_a_fourth(send):
    """The program that starved it: each address asks for 16 answers."""
    greedy = [send(address, n=16, stream=True, **ENDLESS).getresponse() for address in "abc"]
    for response in greedy:
        while not response.readline().startswith(b"data: "):
            pass
    small = send("d", prompt="Hi", max_tokens=4).getresponse()
    assert json.loads(small.read())["usage"]["completion_tokens"] == 4
    begun = Counter(one.address for one in send.engine._begun)
    assert {*"abc"} <= {*begun} and max(begun.values()) <= 16


class Gate:
    """A processor that lets the engine go on after some tokens when it may."""

    def __init__(self, n_tokens):
        self.n_left = n_tokens
        self.reached = Event()
        self.open = Event()

    def __call__(self, tokens, logits):
        self.n_left -= 1
        if self.n_left == 0:
            self.reached.set()
            assert self.open.wait(30)
        return logits


def test_two_addresses_that_come_at_once_have_a_third_each(start):
    engine = start()
    gate = Gate(2)
    submit(engine, SHORT, processors=[gate])
    # The engine looks at its queue when all of the next have come.
    assert gate.reached.wait(30)
    jobs = [*many(engine, "a", PLACES), *many(engine, "b", PLACES)]
    engine.submit(jobs)
    gate.open.set()
    for one in (*jobs[:SHARE], *jobs[PLACES : PLACES + SHARE]):
        wait_until_begun(one)
    begun = [one.address for one in engine._begun]
    assert (begun.count("a"), begun.count("b")) == (SHARE, SHARE)
    stop(engine, jobs)


@pytest.mark.parametrize("fails", [False, True])
def test_an_answer_that_waited_again_has_the_text_that_it_has_alone(
    start, flash, monkeypatch, fails
):
    """With a seed, too, and where its cache is lost."""
    engine = start("--decode-concurrency", 3)
    drawn = {"temperature": 1.5, "seed": 3}
    alone = tokens_of(submit(engine, SHORT, 40, **drawn))
    plain = generated(flash, [*SHORT, 5], 40)
    if fails:
        monkeypatch.setattr(Batch, "remove", lambda self, jobs: 1 / 0)
    gate = Gate(10)
    jobs = [job(engine, SHORT, 40, **drawn), job(engine, [*SHORT, 5], 40)]
    jobs.append(job(engine, [*SHORT, 6], 40, processors=[gate]))
    engine.submit(addressed(jobs, "a"))
    # All three have begun then, and none has ended.
    assert gate.reached.wait(30)
    others = addressed([job(engine, [*SHORT, 7, i]) for i in range(6)], "b")
    engine.submit(others)
    gate.open.set()
    for one in others:
        assert len(tokens_of(one)) == 8
    assert [tokens_of(one) for one in jobs[:2]] == [alone, plain]
    assert {one.address for one in jobs + others if one.alone} == {"a"} or fails
    assert tokens_of(jobs[2]) == generated(flash, [*SHORT, 6], 40)
