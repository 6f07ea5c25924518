"""Several texts at once, with the face of mlx-lm's ``BatchGenerator``."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat import mlx_lm as compat
from .caches import UNKNOWN_CACHE, BatchCaches, are_known
from .decoder import Decoder
from .guesses import check_lookup, guesser_of
from .prompt_queue import PromptQueue, Waiting
from .proposer import Proposer
from .sequence import Sequence, own_processors

CLEAR_EVERY = 512  # steps, as in mlx-lm's batches
Entry = TypeVar("Entry")
NO_LOGPROBS = mx.array([0.0])  # evaluated: a lazy one would belong to the importing thread


@dataclass
class Response:
    """A token of a text, with the fields that mlx-lm's responses have in 0.31 and in 0.32."""

    uid: int
    token: int
    logprobs: mx.array  # (V,); (1,) where they are not wanted
    finish_reason: str | None  # "stop", "length", or None while the text goes on
    prompt_cache: list[Any] | None  # at the text's end: with the tokens handed out
    all_tokens: list[int] | None  # at the text's end: the tokens in the cache
    from_draft: bool = False  # whether the token was guessed
    match_sequence: Any = None  # of a state machine of mlx-lm 0.31
    current_state: Any = None


@dataclass
class _Text:
    """A text of the batch, from its insertion to its end."""

    sequence: Sequence
    prompt: list[int]
    matcher: Any  # finds what ends it
    decoded_alone: bool = False


def _for_each(name: str, entries: list[Entry] | None, default: Entry, n: int) -> list[Entry]:
    """The entries of ``n`` texts: those of a caller, or the default for each.

    Raises:
        ValueError: As from mlx-lm, if the caller has given another number of them.
    """
    if not entries:
        return [default] * n
    if len(entries) != n:
        raise ValueError(
            f"Option {name} must have one entry per segment: expected {n}, got {len(entries)}."
        )
    return entries


def check_batched_lookup(proposer: Proposer, max_kv_size: int | None = None) -> None:
    """Checks that a lookup that is asked for has wide steps in a batch with one text.

    Raises:
        ValueError: As :func:`check_lookup`.
    """
    if proposer.settings.lookup == "on":
        caches = compat.make_prompt_cache(proposer.model, max_kv_size)
        check_lookup(proposer, BatchCaches().merged([caches]))


class VerifiedBatchGenerator:
    """mlx-lm's ``BatchGenerator`` with the choices of the dense model.

    :meth:`next` hands out at most one token of each text, and computes nothing while accepted
    tokens are left. If several texts draw from MLX's random state, all are decoded densely, so that
    they draw as in mlx-lm.

    Args:
        model: A model of mlx-lm.
        proposer: Proposes the tokens; None makes one for the model.
        max_tokens: The most tokens of a text that gives no number of its own.
        stop_tokens: Tokens, or sequences of tokens, that end a text.
        sampler: The sampler of texts that give none; None takes the likeliest token.
        logits_processors: The processors of texts that give none.
        completion_batch_size: The most texts that are generated at once.
        prefill_batch_size: The most prompts that are read at once.
        prefill_step_size: The most tokens of each that are read at once.
        max_kv_size: The most tokens of a cache.
        stream: Where it computes.
        logprobs: Whether texts that are inserted from now on need log-probabilities.
        announce: Called for each token with how it was decoded, as by :func:`verified_steps`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        proposer: Proposer | None = None,
        max_tokens: int = 128,
        stop_tokens: Any = None,
        sampler: Any = None,
        logits_processors: Any = None,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
        max_kv_size: int | None = None,
        stream: Any = None,
        logprobs: bool = True,
        announce: Callable[[str], Any] | None = None,
    ):
        self.model = model
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.logits_processors = logits_processors or []
        self.prefill_step_size = prefill_step_size
        self.prefill_batch_size = prefill_batch_size
        self.completion_batch_size = max(completion_batch_size, prefill_batch_size)
        self.max_kv_size = max_kv_size
        self.logprobs = logprobs
        self._announce = announce
        self._stream = compat.generation_stream if stream is None else stream
        self._stops = compat.stop_matchers(stop_tokens)
        self._proposer = Proposer(model) if proposer is None else proposer
        self._counters = compat.BatchCounters()
        self._prompts = PromptQueue(model, prefill_batch_size, prefill_step_size, self._counters)
        self._decoder = Decoder(self._proposer, BatchCaches(), self._feed)
        self._texts: dict[int, _Text] = {}
        self.n_inserted = 0
        self._old_wired_limit = compat.maybe_set_recommended_wired_limit()

    def _feed(self, tokens: mx.array, layers: list[Any]) -> mx.array:
        return cast(mx.array, self.model(tokens, cache=layers))

    @property
    def stream(self) -> Any:
        """The stream on which the batch computes."""
        return self._stream

    def close(self) -> None:
        """Gives the wired limit back. The generator is of no use afterwards."""
        if self._old_wired_limit is not None:
            mx.synchronize(self._stream)
            mx.set_wired_limit(self._old_wired_limit)
            self._old_wired_limit = None

    def __del__(self) -> None:
        if hasattr(self, "_old_wired_limit"):
            self.close()

    @contextmanager
    def stats(self) -> Iterator[Any]:
        """The work that is done while the block runs, as mlx-lm's ``BatchStats``."""
        with compat.counted(self._counters) as stats:
            yield stats

    def uids(self) -> list[int]:
        """The numbers of the texts that have not ended."""
        return list(self._texts)

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of all caches."""
        nbytes = self._prompts.nbytes
        for layer in self._decoder.caches.layers:
            nbytes += layer.nbytes
        return nbytes

    def insert(
        self,
        prompts: list[list[int]],
        max_tokens: list[int] | None = None,
        caches: list[Any] | None = None,
        all_tokens: list[list[int]] | None = None,
        samplers: list[Any] | None = None,
        logits_processors: list[Any] | None = None,
        stop_sequences: list[Any] | None = None,
        state_machines: list[Any] | None = None,
    ) -> list[int]:
        """Adds texts by their prompts, as :meth:`insert_segments`."""
        return self.insert_segments(
            [[prompt] for prompt in prompts],
            max_tokens,
            caches,
            all_tokens,
            samplers,
            logits_processors,
            stop_sequences,
            state_machines,
        )

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: list[Any] | None = None,
        all_tokens: list[list[int]] | None = None,
        samplers: list[Any] | None = None,
        logits_processors: list[Any] | None = None,
        stop_sequences: list[Any] | None = None,
        state_machines: list[Any] | None = None,
    ) -> list[int]:
        """Adds texts by the segments of their prompts, and returns their numbers.

        The arguments are mlx-lm's. Each is None, or a list with an entry for each text.
        ``all_tokens`` are the tokens that its cache holds. An entry of ``logits_processors`` that
        is None or empty stands for no processor. ``state_machines`` are what mlx-lm 0.31 has in
        place of ``stop_sequences``. A processor that keeps a state is made anew for each text.

        Raises:
            ValueError: As from mlx-lm.
        """
        n = len(segments)
        rows = zip(
            segments,
            _for_each("max_tokens", max_tokens, self.max_tokens, n),
            _for_each("caches", caches, None, n),
            _for_each("all_tokens", all_tokens, [], n),
            _for_each("samplers", samplers, None, n),
            _for_each("logits_processors", logits_processors, self.logits_processors, n),
            _for_each("stop_sequences", stop_sequences or state_machines, None, n),
            strict=True,
        )
        first = self.n_inserted
        added = [self._new_text(first + i, *row) for i, row in enumerate(rows)]
        self.n_inserted += n
        self._texts |= {waiting.uid: text for text, waiting in added}
        self._prompts.add([waiting for _, waiting in added])
        return list(range(first, self.n_inserted))

    def _new_text(
        self,
        uid: int,
        segments: list[list[int]],
        limit: int,
        cache: Any,
        held: list[int],
        sampler: Any,
        processors: Any,
        stops: Any,
    ) -> tuple[_Text, Waiting]:
        parts = [list(part) for part in segments if part]
        if not parts:
            raise ValueError(f"Sequence {uid} has an empty prompt: give it at least one token.")
        if limit <= 0:
            raise ValueError(f"Sequence {uid}'s max_tokens is {limit}: it must be above 0.")
        if len(parts[-1]) != 1:
            parts.append(parts[-1][-1:])
            parts[-2] = parts[-2][:-1]
        held = list(held)
        prompt = [*held, *(token for part in parts for token in part)]
        sequence = Sequence(
            self.sampler if sampler is None else sampler,
            own_processors(processors or ()),
            mx.array(prompt, mx.int32),
            logprobs=self.logprobs,
            limit=limit,
            uid=uid,
            ids_dtype=mx.int32,
        )
        sequence.shares_sampler = sampler is None or compat.CALLS_SHARED_SAMPLERS_ONCE
        matcher = (self._stops if stops is None else compat.as_stop_sequences(stops)).matcher()
        if cache is None:
            cache = compat.make_prompt_cache(self.model, self.max_kv_size)
        if not are_known(cache):
            sequence.end_verified(UNKNOWN_CACHE)
        return _Text(sequence, prompt, matcher), Waiting(uid, parts, cache, held)

    def next(self) -> tuple[list[Any], list[Any]]:
        """Takes a step, and returns responses of prompts and of texts.

        A text has one response for its next accepted token, and none if no token is accepted yet.
        """
        with mx.stream(self._stream):
            return self._next()

    def next_generated(self) -> list[Any]:
        """The next accepted tokens; nothing if there are no more texts."""
        with mx.stream(self._stream):
            while self._texts:
                _, responses = self._next()
                if responses:
                    return responses
        return []

    def extract_cache(self, uids: list[int]) -> dict[int, Any]:
        """Copies of the caches of some texts, with the tokens in them."""
        with mx.stream(self._stream):
            return {uid: self._held(uid) for uid in uids if uid in self._texts}

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Removes texts. Returns, where wanted, their caches with the tokens in them."""
        held = self.extract_cache(uids) if return_prompt_caches else {}
        known = [uid for uid in dict.fromkeys(uids) if uid in self._texts]
        with mx.stream(self._stream):
            self._prompts.remove(known)
            decoded = [self._texts[uid].sequence for uid in known]
            self._decoder.drop([s for s in decoded if s in self._decoder.sequences])
        for uid in known:
            del self._texts[uid]
        return held

    def _held(self, uid: int) -> tuple[list[Any], list[int]]:
        text = self._texts[uid]
        held = self._prompts.held(uid)
        if held is not None:
            return held
        sequence = text.sequence
        tokens = text.prompt + sequence.tokens[: sequence.n_yielded]
        return self._decoder.handed_out_cache(sequence), tokens

    def _settle(self) -> bool:
        """Has texts that must not be ahead any more be as in mlx-lm's loop.

        A caller may have changed what one depends on. And where several draw from MLX's random
        state, their draws depend on when any other begins and ends.

        Returns:
            Whether there were any.
        """
        decoder = self._decoder
        changed = [s for s in decoder.sequences if s.ahead and not s.undisturbed]
        decoder.several_draw = sum(t.sequence.draws_from_mlx for t in self._texts.values()) > 1
        settled = changed
        if decoder.several_draw:
            settled = [sequence for sequence in decoder.sequences if sequence.ahead]
        if settled:
            decoder.settle(settled)
        for sequence in changed:
            sequence.end_verified()
        return bool(settled)

    def _guess_for_one_alone(self) -> None:
        """Gives a text that decodes alone what guesses its tokens, once."""
        sequence = self._decoder.sequences[0]
        text = self._texts[sequence.uid]
        if len(self._decoder.sequences) == 1 and not text.decoded_alone:
            text.decoded_alone = True
            sequence.guesser = guesser_of(self._proposer, text.prompt)

    def _next(self) -> tuple[list[Any], list[Any]]:
        decoder = self._decoder
        settled = self._settle()
        # 1) Tokens that are left from before, or else a round.
        generated = self._hand_out()
        if generated and not settled:
            return [], generated
        if decoder.sequences and not generated:
            began = time.perf_counter()
            self._guess_for_one_alone()
            decoder.round()
            for sequence in decoder.sequences:
                sequence.leave_state()  # also where it has no token yet
            generated = self._hand_out()
            self._counters.decode_time += time.perf_counter() - began
            self._counters.generation_steps += 1
            if self._counters.generation_steps % CLEAR_EVERY == 0:
                mx.clear_cache()
        # 2) Prompts, unless there are as many texts as allowed.
        n_free = self.completion_batch_size - len(decoder.sequences)
        if n_free <= 0:
            return [], generated
        self._prompts.begin(n_free)
        with self._proposer.reading():
            started, responses = self._prompts.start()
            if started is not None:
                logits = self._feed(started.last[:, None], started.cache)[:, -1, :]
                sequences = [self._texts[uid].sequence for uid in started.uids]
                decoder.start(sequences, started.cache, logits)
            responses += self._prompts.read()
        return responses, generated

    def _hand_out(self) -> list[Any]:
        """Hands out one accepted token of each text that has one.

        Ended texts leave together, since mlx-lm's caches are copied each time.
        """
        responses = []
        ended = []
        for sequence in self._decoder.sequences:
            if sequence.ready:
                response = self._response(sequence)
                responses.append(response)
                if response.finish_reason is not None:
                    ended.append(sequence)
        if ended:
            caches = dict(zip(ended, self._decoder.leave(ended), strict=True))
            for response in responses:
                text = self._texts[response.uid]
                if text.sequence in caches:
                    response.prompt_cache = caches[text.sequence]
                    n_tokens = text.sequence.n_yielded
                    response.all_tokens = text.prompt + text.sequence.tokens[:n_tokens]
                    del self._texts[response.uid]
        self._counters.generation_tokens += len(responses)
        return responses

    def _response(self, sequence: Sequence) -> Response:
        text = self._texts[sequence.uid]
        pending = self._decoder.hand_out(sequence)
        token = cast(int, pending.token)
        if self._announce is not None:
            self._announce(self._proposer.mode_of(sequence, sequence.n_yielded))
        reason = "length" if sequence.n_yielded >= sequence.limit else None
        if text.matcher.advance(token):
            reason = "stop"
        return Response(
            sequence.uid,
            token,
            NO_LOGPROBS if pending.logprobs is None else pending.logprobs,
            reason,
            None,
            None,
            bool(pending.guessed),
            getattr(text.matcher, "match_sequence", None),
            getattr(text.matcher, "current_state", None),
        )
