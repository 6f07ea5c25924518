"""The thread that computes: it reads prompts a chunk at a time, between the tokens of others.

While prompts wait, answers in progress have at most half of the time.
"""

import copy
import gc
import logging
import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread

import mlx.core as mx

from ..common.machine import memory_bytes
from ..decoding.policy import policy_of
from ..loading.gain_sentences import speed_text
from ..models.compat.mlx_lm import LRUPromptCache, maybe_set_recommended_wired_limit
from .api_errors import ApiError
from .jobs import Job
from .served_models import ServedModel
from .stages import CHUNK_SECONDS, Batch, CachedTokens, Reading, Single, Stage, next_chunk

# The engine is failing after so many answers in a row that failed by the server's fault.
FAILING = 3
# Where no limit is given, kept prompts take this part of the machine's memory: ten long ones of an
# agent would take more than a Mac has.
KEPT_SHARE = 4

logger = logging.getLogger(__name__)


class Engine:
    """Answers jobs until it is closed, of models that ``load`` loads in the generating thread."""

    def __init__(self, load: Callable[[], list[ServedModel]], flags: Namespace):
        # It has the models, or why loading has failed.
        self.models: Future[list[ServedModel]] = Future()
        self._flags = flags
        self._arrived: SimpleQueue[list[Job]] = SimpleQueue()
        self._ended = Event()
        self._waiting: list[Job] = []
        # The oldest stage comes first.
        self._stages: list[Stage] = []
        # The models whose FlashHeads are built, one after the other.
        self._building: list[ServedModel] = []
        kept_bytes = flags.prompt_cache_bytes or memory_bytes() // KEPT_SHARE
        self._caches = LRUPromptCache(flags.prompt_cache_size, kept_bytes)
        # The number of a prompt's tokens to read at once, and that of all prompts' chunks.
        self._chunk = min(32, flags.prefill_step_size)
        self._n_chunks = 0
        # The seconds that answers have had beyond half of the time.
        self._overtime = 0.0
        # The number of failures since the latest answer that was completed.
        self._n_failures = 0
        self._thread = Thread(target=self._run, args=(load,), name="generation", daemon=True)
        self._thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Puts jobs into the queue. Each gets events until its answer is complete or has failed."""
        self._arrived.put(list(jobs))

    @property
    def status(self) -> str:
        """The engine's state: "loading", "ok", "failing" or "shutting down"."""
        if self._ended.is_set():
            return "shutting down"
        if not self.models.done():
            return "loading"
        if self._n_failures >= FAILING:
            return "failing"
        return "ok"

    def close(self, seconds: float) -> bool:
        """Ends the thread, amid answers. Returns whether it did within ``seconds``."""
        self._ended.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, load: Callable[[], list[ServedModel]]) -> None:
        try:
            models = load()
            maybe_set_recommended_wired_limit()
            self._stream = mx.default_stream(mx.default_device())
            self._building = [each for each in models if each.build is not None]
            for each in self._building:
                each.gate_build(partial(self._may_build, each))
            self.models.set_result(models)
        except BaseException as error:
            self.models.set_exception(error)
            self._ended.set()
        turn_failed = False
        while not self._ended.is_set():
            try:
                self._take_turns()
                turn_failed = False
            except BaseException as error:
                # Whatever has failed, the model stays in memory.
                logger.warning("A turn of the engine has failed", exc_info=error)
                for stage in list(self._stages):
                    self._break_up(stage)
                # If it fails twice in a row, nobody waits any longer.
                while turn_failed and self._waiting:
                    self._fail(self._waiting.pop(0), error)
                turn_failed = True
        for each in self._building:
            each.leave_build()
        # Arrays and streams of MLX must go before their thread ends.
        del self._caches, self._stages
        gc.collect()
        mx.clear_streams()

    def _take_turns(self) -> None:
        self._receive()
        self._waiting = [job for job in self._waiting if not job.ended]
        self._take_out([job for job in self._begun if job.ended])
        self._admit()
        began = time.perf_counter()
        has_read = self._read()
        now = time.perf_counter()
        # Answers have as long as the chunk took; a slow token's rest goes to the next chunks.
        if has_read:
            self._overtime -= now - began
        else:
            self._overtime = 0.0
        if self._overtime <= 0:
            until = now - self._overtime
            while self._decode() and time.perf_counter() < until and self._arrived.empty():
                pass
            self._overtime = min(max(0.0, time.perf_counter() - until), CHUNK_SECONDS)
        self._take_built()

    @property
    def _begun(self) -> list[Job]:
        return [job for stage in self._stages for job in stage.jobs]

    @property
    def _readings(self) -> list[Reading]:
        return [stage for stage in self._stages if isinstance(stage, Reading)]

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._stages)

    @contextmanager
    def _working_for(self, jobs: list[Job], stage: Stage | None = None) -> Iterator[None]:
        """A block that works for some jobs, and whose failure costs one of them at most.

        Args:
            jobs: They fail if the block does, or go on alone if one of several may be the cause.
            stage: What is amid a step then, and must not be used any more.
        """
        try:
            yield
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                logger.warning("A step of %d answers has failed", len(jobs), exc_info=error)
            if stage is not None:
                self._break_up(stage)

    def _may_build(self, served: ServedModel) -> bool:
        """Whether the build of a model may go on now: one after the other, while nobody waits."""
        return not self._busy and self._building[0] is served

    def _take_built(self) -> None:
        """Takes over what a build has ended with, while no text is in progress."""
        if self._busy or not self._building:
            return
        served = self._building[0]
        build = served.build
        if build is not None and not build.has_ended:
            return
        try:
            if build is not None:
                build.take_over(served.model)
            if served.head is not None and not policy_of(served.head).dense:
                speed = speed_text(policy_of(served.head).tuning)
                logger.info("%s is served with its FlashHead (speed: %s)", served.name, speed)
        except BaseException as error:
            logger.warning("%s stays dense: %s", served.name, error)
        served.build = None
        del self._building[0]

    def _receive(self) -> None:
        if not self._busy:
            with suppress(Empty):
                self._waiting += self._arrived.get(timeout=0.1)
        while not self._arrived.empty():
            self._waiting += self._arrived.get()

    def _admit(self) -> None:
        """Begins answers: of each address its share of those at once, and more if no other waits.

        The shares leave one for an address that is not here yet.
        """
        n_at_once: int = self._flags.decode_concurrency
        # The number of answers of each address.
        n_begun = Counter(job.address for job in self._begun)
        waiting_addresses = {job.address for job in self._waiting}
        n_addresses = len(waiting_addresses | n_begun.keys())
        share = math.ceil(n_at_once / (n_addresses + 1))
        others_wait = len(waiting_addresses) > 1
        for job in list(self._waiting):
            is_full = n_begun.total() >= n_at_once
            if n_begun[job.address] >= share and (is_full or others_wait):
                continue
            # Answers to one prompt wait until it is read, and begin with a copy of its cache.
            if any(reading.job.prompt is job.prompt for reading in self._readings):
                continue
            if is_full:
                address, n_most = n_begun.most_common(1)[0]
                if n_most <= share:
                    continue
                # The shortest of theirs waits again.
                theirs = [job for job in self._begun if job.address == address]
                shortest = min(theirs, key=lambda job: len(job.tokens))
                self._take_out([shortest])
                n_begun[address] -= 1
            self._waiting.remove(job)
            n_begun[job.address] += 1
            with self._working_for([job]):
                self._stages.append(Reading(job, self._caches, self._flags))

    def _read(self) -> bool:
        """Reads a chunk of a prompt; at its end the answer begins. Returns whether it has read."""
        readings = self._readings
        if not readings:
            return False
        self._n_chunks += 1
        # The prompt that came first and the shortest rest take turns, so that none waits for ever.
        reading = readings[0]
        if self._n_chunks % 2 == 0:
            reading = min(readings, key=lambda reading: reading.left)
        job = reading.job
        with self._working_for([job], reading):
            if reading.left:
                began = time.perf_counter()
                n_read = reading.read(self._chunk)
                took = time.perf_counter() - began
                largest = self._flags.prefill_step_size
                self._chunk = next_chunk(self._chunk, n_read, took, largest)
            is_shared = any(other.prompt is job.prompt for other in self._waiting)
            if reading.done in job.prompt.landmarks or (is_shared and not reading.left):
                self._store(job.served, copy.deepcopy(reading.cached))
            if not reading.left:
                self._begin(reading)
        return True

    def _begin(self, reading: Reading) -> None:
        self._stages.remove(reading)
        job = reading.job
        if job.alone or not job.served.batchable or self._flags.kv_bits is not None:
            self._stages.append(Single(reading, self._flags, self._stream))
            return
        batch = self._batch_for(job)
        with self._working_for([job], batch):
            batch.add(reading)

    def _batch_for(self, job: Job) -> Batch:
        """The batch that takes a job, which is a new one if there is none."""
        for stage in self._stages:
            if isinstance(stage, Batch) and stage.key == job.batch_key:
                return stage
        batch = Batch(job, self._flags.decode_concurrency, self._stream)
        self._stages.append(batch)
        return batch

    def _decode(self) -> bool:
        """Generates a token for every answer in progress. Returns whether there were any."""
        decoding = [stage for stage in self._stages if not isinstance(stage, Reading)]
        for stage in decoding:
            with self._working_for(stage.jobs, stage):
                for job, token, logprobs in stage.step():
                    with self._working_for([job]):
                        if job.take(token, logprobs):
                            self._n_failures = 0
                self._take_out([job for job in stage.jobs if job.ended])
        return bool(decoding)

    def _take_out(self, jobs: list[Job]) -> None:
        """Takes answers out, and keeps what has been computed. Those that are wanted wait again.

        A cache that cannot be stored costs nobody's answer.
        """
        for stage in list(self._stages):
            taken = [job for job in stage.jobs if job in jobs]
            if not taken:
                continue
            try:
                for cached in stage.remove(taken):
                    self._store(taken[0].served, cached)
            except BaseException as error:
                logger.warning("Caches of answers are lost: %s", error, exc_info=error)
                self._break_up(stage)
        self._stages = [stage for stage in self._stages if stage.jobs]
        self._go_on_alone(jobs)

    def _break_up(self, stage: Stage) -> None:
        self._stages = [other for other in self._stages if other is not stage]
        self._go_on_alone(stage.jobs)

    def _go_on_alone(self, jobs: list[Job]) -> None:
        """Goes on with those jobs that are wanted from their accepted tokens, each by itself."""
        wanted = [job for job in jobs if not (job.ended or job in self._waiting)]
        for job in wanted:
            job.alone = True
        self._waiting[:0] = wanted

    def _store(self, served: ServedModel, cached: CachedTokens) -> None:
        """Keeps tokens and their cache, which must not change any more."""
        tokens, cache = cached
        try:
            if tokens:
                # A part of a batch's cache that is not evaluated would keep the whole of it.
                mx.eval([layer.state for layer in cache])
                self._caches.insert_cache(served.name, tokens, cache)
        except BaseException as error:
            logger.warning("A prompt's cache is not stored: %s", error, exc_info=error)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, ApiError):
            self._n_failures += 1
            logger.error("An answer has failed", exc_info=error)
        job.ended = True
        job.emit(error)
