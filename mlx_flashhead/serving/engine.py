"""The thread that computes: it reads prompts a chunk at a time, between the tokens of others.

While prompts wait, answers in progress have a token after each chunk, and at most half of the time:
less if they are fewer than the prompts, so that a burst of questions soon shares one batch. Where a
token of all answers takes longer than a chunk, several chunks are read before it.
"""

import copy
import gc
import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

import mlx.core as mx

from ..models.compat.mlx_lm import LRUPromptCache, maybe_set_recommended_wired_limit
from ..models.compat.mlx_lm_0_31 import let_thread_draw
from ..models.install import get_flash_head
from .decoding import CHUNK_SECONDS, Batch, PrefillPace, Reading, Single, next_reading
from .jobs import Job
from .responses import ApiError
from .served_models import ServedModel

SHUTTING_DOWN = "The server is shutting down."
_IDLE_SECONDS = 0.1
STUCK_SECONDS = 300.0  # of one turn: no chunk of a prompt takes as long
MOST_BUILD_SECONDS = 0.2  # of a build at once, while answers are written
FAILING = 3  # answers, one after the other, that failed by the server's fault

logger = logging.getLogger(__name__)


class Engine:
    """Answers jobs until it is closed, of models that ``load`` loads in the generating thread."""

    def __init__(self, load: Callable[[], list[ServedModel]], flags: Namespace):
        self.models: Future[list[ServedModel]] = Future()  # or why loading has failed
        self._flags = flags
        self._arrived: SimpleQueue[Job] = SimpleQueue()
        self._ended = Event()
        self._waiting: list[Job] = []
        self._readings: list[Reading] = []
        self._decoders: list[Batch | Single] = []
        self._caches = LRUPromptCache(flags.prompt_cache_size)
        self._pace = PrefillPace(flags.prefill_step_size)
        self._n_read = self._n_chunks = 0  # of all prompts: tokens and chunks
        self._answer_seconds = 0.0  # of the latest tokens of all answers
        self._n_failures = 0  # since the latest answer that was completed
        self._latest_turn = math.inf  # nothing is stuck before the first one
        self._closing = Lock()  # held while jobs arrive, and when no more are taken
        self._closed = False
        self._builds: list[ServedModel] = []
        self._build_seconds = 0.0  # that a build may take while answers are written
        self._thread = Thread(target=self._run, args=(load,), name="generation", daemon=True)
        self._thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Puts jobs into the queue. Each gets events until its answer is complete or has failed."""
        for job in jobs:
            with self._closing:
                if self._closed:
                    job.emit(ApiError(SHUTTING_DOWN, status=503))
                else:
                    self._arrived.put(job)

    @property
    def healthy(self) -> bool:
        """Whether jobs are answered: the thread lives, and comes back from its turns."""
        stuck = time.monotonic() - self._latest_turn > STUCK_SECONDS
        return self._thread.is_alive() and not self._ended.is_set() and not stuck

    @property
    def status(self) -> str:
        """ "loading", "ok", "failing" or "shutting down"."""
        if self._ended.is_set():
            return "shutting down"
        if not self.models.done():
            return "loading"
        return "ok" if self.healthy and self._n_failures < FAILING else "failing"

    def close(self, seconds: float) -> bool:
        """Ends the thread, amid answers. Returns whether it did within ``seconds``."""
        self._ended.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, load: Callable[[], list[ServedModel]]) -> None:
        try:
            models = load()
            maybe_set_recommended_wired_limit()
            let_thread_draw()
            self._stream = mx.default_stream(mx.default_device())
            self._builds = [served for served in models if served.build is not None]
            self.models.set_result(models)
        except BaseException as error:
            self.models.set_exception(error)
            self._ended.set()
        turn_failed = False
        while not self._ended.is_set():
            self._latest_turn = time.monotonic()
            try:
                self._take_turns()
                turn_failed = False
            except BaseException as error:  # whatever it is, the model stays in memory
                logger.warning("A turn of the engine has failed", exc_info=error)
                begun = [job for job in self._all_jobs() if job not in self._waiting]
                self._readings, self._decoders = [], []
                self._go_on_alone(begun)
                while turn_failed and self._waiting:  # twice in a row, so nobody waits any longer
                    self._fail(self._waiting.pop(0), error)
                turn_failed = True
        with self._closing:
            self._closed = True
        self._take_arrived()
        for job in self._all_jobs():
            job.emit(ApiError(SHUTTING_DOWN, status=503))
        # arrays and streams of MLX must go before their thread ends
        del self._caches, self._readings, self._decoders
        gc.collect()
        mx.clear_streams()

    def _take_turns(self) -> None:
        self._receive()
        began = time.perf_counter()
        self._drop_cancelled()
        share = time_for_answers(self._n_decoded(), len(self._readings))
        chunks_end = began + min(self._answer_seconds / share if share else 0, CHUNK_SECONDS)
        while self._read() and time.perf_counter() < chunks_end:
            self._receive()
            self._drop_cancelled()
        now = time.perf_counter()
        share = time_for_answers(self._n_decoded(), len(self._readings))
        until = now + (now - began) * share
        while self._decode() and time.perf_counter() < until and self._arrived.empty():
            self._drop_cancelled()
        ended = time.perf_counter()
        self._answer_seconds = ended - now
        self._build(ended - began)

    def _all_jobs(self) -> list[Job]:
        jobs = [*self._waiting, *(reading.job for reading in self._readings)]
        jobs += [job for decoder in self._decoders for job in decoder.jobs]
        return [*dict.fromkeys(jobs)]

    def _n_decoded(self) -> int:
        return sum(len(decoder.jobs) for decoder in self._decoders)

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._readings or self._decoders)

    def _build(self, seconds: float) -> None:
        """Advances a build: in idle time, else for a fourth of the answers' ``seconds``."""
        if not self._builds:
            return
        self._build_seconds = min(self._build_seconds + seconds / 4, MOST_BUILD_SECONDS)
        served = self._builds[0]
        if self._busy and (self._build_seconds <= 0 or served.head is not None):
            return  # a speed that is measured beside answers says little
        began, build = time.perf_counter(), served.build
        assert build is not None
        try:
            more = build.advance()
            if served.head is None and get_flash_head(served.model) is not None:
                served.head = get_flash_head(served.model)
                for decoder in self._decoders:
                    if decoder.jobs[0].served is served:
                        decoder.proposer.look_for_head()
                logger.info("%s is served with its FlashHead from now on", served.name)
        except BaseException as error:
            logger.warning("%s stays dense: %s", served.name, error)
            more = False
        if not more:
            build.drop()
            served.build = None
            del self._builds[0]
        if self._busy:
            self._build_seconds -= time.perf_counter() - began

    def _receive(self) -> None:
        if not self._busy and not self._builds:
            with suppress(Empty):
                self._waiting.append(self._arrived.get(timeout=_IDLE_SECONDS))
        self._take_arrived()
        n_free = self._flags.decode_concurrency - len(self._readings) - self._n_decoded()
        for job in list(self._waiting):
            # answers to one prompt wait until it is read, and begin with a copy of its cache
            if n_free > 0 and not any(r.job.prompt is job.prompt for r in self._readings):
                self._waiting.remove(job)
                n_free -= 1
                try:
                    reading = Reading(job, self._caches, self._flags)
                    reading.due = self._n_read + reading.left
                    self._readings.append(reading)
                except BaseException as error:
                    self._fail(job, error)

    def _take_arrived(self) -> None:
        while not self._arrived.empty():
            self._waiting.append(self._arrived.get())

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if job.wanted]
        for reading in [r for r in self._readings if not r.job.wanted]:
            self._readings.remove(reading)
            self._store(reading.job.served, reading.cached)
        for decoder in list(self._decoders):
            self._remove(decoder, [job for job in decoder.jobs if not job.wanted])

    def _read(self) -> bool:
        """Reads a chunk of one prompt. Returns whether prompts are left.

        A prompt that is read completely goes on to decoding.
        """
        if not self._readings:
            return False
        self._n_chunks += 1
        reading = next_reading(self._readings, self._n_chunks)
        try:
            if reading.left:
                self._n_read += reading.read(self._pace)
                if reading.done in reading.job.prompt.landmarks:
                    self._store(reading.job.served, copy.deepcopy(reading.cached), "user")
            if not reading.left:
                self._readings.remove(reading)
                if any(job.prompt is reading.job.prompt for job in self._waiting):
                    self._store(reading.job.served, copy.deepcopy(reading.cached))
                self._begin(reading)
        except BaseException as error:
            self._fail(reading.job, error)
            if reading in self._readings:
                self._readings.remove(reading)
        return bool(self._readings)

    def _begin(self, reading: Reading) -> None:
        job = reading.job
        if job.alone or not job.served.batchable or self._flags.kv_bits is not None:
            self._decoders.append(Single(reading, self._flags, self._stream))
            return
        batches = (d for d in self._decoders if isinstance(d, Batch) and d.fits(job))
        if (batch := next(batches, None)) is None:
            batch = Batch(job, self._flags.decode_concurrency, self._stream)
            self._decoders.append(batch)
        try:
            batch.add(reading)
        except BaseException:
            # the sequence may be in the batch, where nobody would answer for it
            self._decoders.remove(batch)
            self._go_on_alone([other for other in batch.jobs if other is not job])
            raise

    def _decode(self) -> bool:
        """Generates a token for every answer in progress. Returns whether there are any."""
        for decoder in list(self._decoders):
            try:
                steps = decoder.step()
            except BaseException as error:
                self._decoders.remove(decoder)
                if len(jobs := decoder.jobs) == 1:
                    self._fail(jobs[0], error)
                else:  # one of them may be the cause
                    logger.warning("A step of %d answers has failed", len(jobs), exc_info=error)
                    self._go_on_alone(jobs)
                continue
            complete: list[Job] = []
            for job, token, logprobs in steps:  # several tokens of a job may come at once
                try:
                    if job not in complete and job.take(token, logprobs):
                        complete.append(job)
                        self._n_failures = 0
                except BaseException as error:
                    self._fail(job, error)
                    complete.append(job)
            self._remove(decoder, complete)
        return bool(self._decoders)

    def _go_on_alone(self, jobs: list[Job]) -> None:
        """Answers go on from their accepted tokens, each by itself."""
        for job in jobs:
            job.alone = True
        self._waiting = [*(job for job in jobs if job.wanted), *self._waiting]

    def _remove(self, decoder: Batch | Single, jobs: list[Job]) -> None:
        """Takes answers out of a decoder. A cache that cannot be stored costs nobody's answer."""
        if not jobs:
            return
        try:
            cached = decoder.remove(jobs)
        except BaseException as error:
            logger.warning("Caches of %d answers are lost: %s", len(jobs), error, exc_info=error)
            self._decoders.remove(decoder)
            self._go_on_alone([job for job in decoder.jobs if job not in jobs])
            return
        if not decoder.jobs:
            self._decoders.remove(decoder)
        for each in cached:
            self._store(jobs[0].served, each)

    def _store(self, served: ServedModel, cached: tuple, kind: str = "assistant") -> None:
        """Keeps tokens and their cache, which must not change any more, as far as there is room.

        Of mlx-lm's kinds "system", "user" and "assistant" the last is dropped first.
        """
        (tokens, cache), most = cached, self._flags.prompt_cache_bytes
        try:
            if tokens:
                # evaluated, since an unevaluated part of a batch's cache keeps the whole of it
                mx.eval([layer.state for layer in cache])
                self._caches.insert_cache(served.name, tokens, cache, cache_type=kind)
            if most is not None:
                in_use = sum(part.nbytes for part in (*self._decoders, *self._readings))
                self._caches.trim_to(n_bytes=most - in_use)
        except BaseException as error:
            logger.warning("A prompt's cache is not stored: %s", error, exc_info=error)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, ApiError):
            self._n_failures += 1
            logger.error("An answer has failed", exc_info=error)
        job.ended = True
        job.emit(error)


def time_for_answers(n_answers: int, n_prompts: int) -> float:
    """The time for answers in progress, relative to that of the prompts: at most as much."""
    return min(1.0, n_answers / max(1, n_prompts))
