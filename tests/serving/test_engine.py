"""The generating thread: turns of prompts and answers, cancelling at any moment, failures."""

import threading
import time
from queue import SimpleQueue

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler

import mlx_flashhead
from mlx_flashhead.serving import reading
from mlx_flashhead.serving.decoding import length_class
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.job import Failure, Job, Progress, Token
from mlx_flashhead.serving.prompts import Prompt
from mlx_flashhead.serving.reading import CHUNK_SECONDS, SMALLEST_CHUNK, Pace
from mlx_flashhead.serving.requests import read_request
from mlx_flashhead.serving.sampling import sampler_for
from mlx_flashhead.serving.served import Catalogue
from model_folders import write_model
from served_models import flags, served_model

LONG = [2 + (7 * i) % 250 for i in range(400)]
SHORT = [40, 41, 42]
CHUNK = 16  # tokens of a prompt in the tests' engines
NEVER_ENDS = {"logit_bias": {"50": 100}}


def running(load, *arguments):
    """An engine; must be closed."""
    engine = Engine(load, flags("--prefill-step-size", CHUNK, *arguments))
    engine.catalogue.result(60)
    return engine


@pytest.fixture
def start(random_model):
    """A function that starts engines of the random model: (flags) → engine."""
    engines = []

    def start(*arguments, **options):
        def load():
            return Catalogue([served_model(random_model / "flash", **options)])

        engines.append(running(load, *arguments))
        return engines[-1]

    yield start
    for engine in engines:
        assert engine.close(20)


@pytest.fixture(scope="module")
def flash(random_model):
    """``(model, tokenizer)`` of what the engines serve."""
    return mlx_flashhead.load(str(random_model / "flash"))


def job(engine, tokens, max_tokens=8, processors=(), landmarks=(), **fields):
    """A job of a request with these fields."""
    catalogue = engine.catalogue.result()
    body = {"prompt": "x"} | fields
    request = read_request(body, chat=False, catalogue=catalogue, defaults=flags())
    return Job(
        served=request.served,
        prompt=Prompt(list(tokens), landmarks),
        max_tokens=max_tokens,
        sampler=sampler_for(request.served, request.sampling, request.seed),
        processors=[*request.penalties.processors(), *processors],
        stop=request.stop,
        n_probes=request.n_probes,
        num_draft_tokens=request.num_draft_tokens,
        logprobs=0,
        index=0,
        events=SimpleQueue(),
    )


def submit(engine, *arguments, **fields):
    new = job(engine, *arguments, **fields)
    engine.submit([new])
    return new


def until(job, kind):
    """The next event of a kind."""
    while True:
        _, event = job.events.get(timeout=30)
        if isinstance(event, kind):
            return event


def tokens_of(job):
    """All tokens of an answer, but an end token."""
    found = []
    while True:
        event = until(job, Token | Failure)
        assert isinstance(event, Token), event
        if event.logprobs is not None:
            found.append(event.logprobs.token)
        if event.finish_reason is not None:
            return found


def generated(flash, tokens, max_tokens=8, **options):
    """The same by the package."""
    responses = mlx_flashhead.stream_generate(*flash, tokens, max_tokens=max_tokens, **options)
    return [r.token for r in responses if r.token not in flash[1].eos_token_ids]


@pytest.fixture
def chunks(monkeypatch):
    """(thread-safe) list of the chunks that are read, each of which takes a moment."""
    read = []
    compute = reading.Reading._compute

    def slow(self, tokens):
        read.append((self.job, tokens.size))
        time.sleep(0.02)
        compute(self, tokens)

    monkeypatch.setattr(reading.Reading, "_compute", slow)
    return read


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


def test_progress_is_told_until_the_prompt_is_read(start, chunks):
    one = submit(start(), LONG)
    told = []
    while True:
        _, event = one.events.get(timeout=30)
        if isinstance(event, Token):
            break
        told.append(event)
    assert len(told) == -(-399 // CHUNK)
    assert told[0] == Progress(CHUNK, 400)
    assert told[-1] == Progress(399, 400)


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


def test_a_failure_ends_the_answer_and_nothing_else(start, flash):
    engine = start()

    def fails(tokens, logits):
        raise RuntimeError("of this sequence")

    bad = submit(engine, SHORT, processors=[fails])
    assert str(until(bad, Failure | Token).error) == "of this sequence"
    good = submit(engine, SHORT)
    assert tokens_of(good) == generated(flash, SHORT)
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


def test_prompts_that_begin_alike_share_what_is_read(start, flash, chunks):
    engine = start()
    tokens_of(submit(engine, LONG))
    other = [*LONG[:200], *SHORT]
    del chunks[:]
    one = submit(engine, other)
    assert tokens_of(one) == generated(flash, other)
    assert one.cached == 200
    assert sum(size for _, size in chunks) == 2
    same = submit(engine, LONG)
    assert tokens_of(same) == generated(flash, LONG)
    assert same.cached == 399


def test_caches_are_bounded(start):
    engine = start("--prompt-cache-bytes", "1K")
    tokens_of(submit(engine, LONG))
    again = submit(engine, LONG[:100])
    tokens_of(again)
    assert again.cached == 0


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
    assert seen[3] == [*LONG, *tokens[:3]]


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


# One sequence at a time: draft models, quantized caches


@pytest.fixture(scope="module")
def drafting(random_model):
    """An engine whose model drafts for itself."""

    def load():
        served = served_model(random_model / "flash")
        served.draft_model, _ = mlx_flashhead.load(str(random_model / "flash"))
        served.batchable = False
        return Catalogue([served])

    engine = running(load)
    yield engine
    assert engine.close(20)


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


# Caches that cannot be cut back


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A converted folder of a model with a sliding window of 32 tokens."""
    folder = tmp_path_factory.mktemp("sliding")
    further = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
    further |= {"sliding_window_pattern": 2}
    write_model(folder / "dense", arch="gemma3_text", hidden_size=64, further=further)
    new = folder / "flash"
    mlx_flashhead.convert(
        str(folder / "dense"), str(new), calibration="none", progress=False, n_probes=4
    )
    return new


def test_landmarks_are_found_again_where_a_cache_cannot_be_cut(sliding, chunks):
    engine = running(lambda: Catalogue([served_model(sliding)]))
    loaded = mlx_flashhead.load(str(sliding))
    try:
        assert not engine.catalogue.result().default.cuttable
        first, second = [*LONG[:80], 50, 51], [*LONG[:80], 60, 61, 62]
        assert tokens_of(submit(engine, first, landmarks=(80, 81))) == generated(loaded, first)
        one = submit(engine, second, landmarks=(80, 82))
        assert tokens_of(one) == generated(loaded, second)
        assert one.cached == 80
        same = submit(engine, first, landmarks=(80, 81))
        assert tokens_of(same) == generated(loaded, first)
        assert same.cached == 81
    finally:
        assert engine.close(20)


# How much is read at once


def test_pace_finds_what_fits_into_a_chunks_time():
    pace = Pace(2048)
    for _ in range(20):
        pace.took(pace.n_tokens, pace.n_tokens / 10_000)  # 10,000 tokens a second
    assert CHUNK_SECONDS / 4 <= pace.n_tokens / 10_000 <= CHUNK_SECONDS
    for _ in range(20):
        pace.took(pace.n_tokens, pace.n_tokens / 1000)  # ten times as slow, far into a prompt
    assert CHUNK_SECONDS / 4 <= pace.n_tokens / 1000 <= CHUNK_SECONDS
    for _ in range(20):
        pace.took(pace.n_tokens, 100.0)
    assert pace.n_tokens == SMALLEST_CHUNK
    for _ in range(20):
        pace.took(pace.n_tokens, 0.0)
    assert pace.n_tokens == 2048
    assert Pace(8).n_tokens == 8
