"""Several texts at once: mlx-lm's ``BatchGenerator``, in which the decoder makes the tokens.

mlx-lm's own code takes the texts in, reads their prompts and gives their caches back. So chunks and
padding, and with them the rounding, are mlx-lm's. What stands in the place of its
``GenerationBatch`` has the names that 0.31 and 0.32 call there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat import inner_batch
from ..models.compat import mlx_lm as compat
from ..models.trained_drafter import TrainedDrafter
from ..wide.trial import established_costs
from .caches import BatchCaches, are_known
from .decoder import Decoder
from .guessing.guesses import check_lookup, guesses_of
from .guessing.trained import TrainedDrafts
from .phase import DISTURBED, UNKNOWN_CACHE, Mode, Phase
from .proposer import Proposer
from .sampling import Processor, Sampler, SamplerFunction
from .text import Text, mode_of, own_processors

BatchGenerator: Any = inner_batch.ClosableBatchGenerator
# It is evaluated: a lazy one would belong to the importing thread.
NO_LOGPROBS = mx.array([0.0])


@dataclass
class Response:
    """A token of a text, with the fields that mlx-lm's responses have in 0.31 and in 0.32.

    Attributes:
        uid: The number of the text.
        token: The token.
        logprobs: (V,); (1,) where they are not wanted.
        finish_reason: "stop", "length", or None while the text goes on.
        from_draft: Whether the token was guessed.
        match_sequence: Of a state machine of mlx-lm 0.31.
        current_state: The same one's.
        prompt_cache: At the text's end: the caches, with the tokens handed out.
        all_tokens: At the text's end: the tokens in these.
    """

    uid: int
    token: int
    logprobs: mx.array
    finish_reason: str | None
    from_draft: bool = False
    match_sequence: Sequence[int] | None = None
    current_state: str | None = None
    prompt_cache: list[Any] | None = None
    all_tokens: list[int] | None = None


@dataclass
class _Entry:
    """A text of the batch, from its insertion to its end.

    Attributes:
        text: The text.
        prompt: The tokens before it.
        matcher: Finds what ends it.
        drafts: What guesses its tokens. It has heard the prompt but for the last token.
        decoded_alone: Whether there was a time when no other text was decoded.
    """

    text: Text
    prompt: list[int]
    matcher: Any
    drafts: TrainedDrafts | None = None
    decoded_alone: bool = False

    @property
    def tokens(self) -> list[int]:
        """Its tokens as far as they are handed out, after those of its prompt."""
        return self.prompt + self.text.tokens[: self.text.n_yielded]


def check_batched_lookup(proposer: Proposer, max_kv_size: int | None = None) -> None:
    """Checks that a lookup that is asked for has wide steps in a batch with one text.

    Raises:
        ValueError: As :func:`check_lookup`.
    """
    if proposer.settings.lookup == "on":
        caches = compat.make_prompt_cache(proposer.model, max_kv_size)
        check_lookup(proposer, BatchCaches.merged([caches]))


class VerifiedBatchGenerator(BatchGenerator):  # type: ignore[misc]
    """mlx-lm's ``BatchGenerator`` with the choices of the dense model.

    :meth:`next` hands out at most one token of each text, and makes none while accepted tokens are
    left. If several texts draw from MLX's random state, all are decoded densely, so that they draw
    as in mlx-lm.

    Args:
        model: A model of mlx-lm.
        proposer: Proposes the tokens; None makes one for the model.
        sampler: The sampler of texts that give none; None takes the likeliest token.
        logprobs: Whether texts that are inserted from now on need log-probabilities.
        announce: Called for each token with how it was decoded, as by :func:`verified_tokens`.
        drafter: Guesses the tokens of a text that decodes alone.
        num_draft_tokens: Tokens that it guesses at a time, at most.
        **options: The other keywords are mlx-lm's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        proposer: Proposer | None = None,
        sampler: Sampler | SamplerFunction | None = None,
        logprobs: bool = True,
        announce: Callable[[Mode], object] | None = None,
        drafter: TrainedDrafter | None = None,
        num_draft_tokens: int = 3,
        **options: Any,
    ):
        super().__init__(model, **options)
        self.sampler = sampler
        self.logprobs = logprobs
        if proposer is None:
            proposer = Proposer(model)
        self._proposer = proposer
        self._entries: dict[int, _Entry] = {}
        self._drafter = drafter
        self._n_drafts = num_draft_tokens
        # No token is drawn from it.
        any_sampler = cast(SamplerFunction, sampler)
        prompts = _Prompts.empty(model, any_sampler, self.prefill_step_size)
        if drafter is not None:
            self._proposer.hear_states()
            prompts.reading = self._hearing
        inner_batch.set_prompts(self, prompts)
        generation = _Generation(self._proposer, self._entries, announce)
        inner_batch.set_decoded_texts(self, generation)

    def uids(self) -> list[int]:
        """The numbers of the texts that have not ended."""
        return list(self._entries)

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: list[list[Any] | None] | None = None,
        all_tokens: list[list[int]] | None = None,
        samplers: list[Sampler | SamplerFunction | None] | None = None,
        logits_processors: list[Sequence[Processor] | None] | None = None,
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
        parts = [[list(part) for part in prompt if part] for prompt in segments]
        limits = max_tokens or [self.max_tokens] * n
        stops = stop_sequences or state_machines
        # mlx-lm 0.31 does not check it.
        _check_lengths(
            n,
            max_tokens=limits,
            caches=caches,
            all_tokens=all_tokens,
            samplers=samplers,
            logits_processors=logits_processors,
            stop_sequences=stops,
        )
        first = inner_batch.next_uid(self)
        for uid, (prompt, limit) in enumerate(zip(parts, limits, strict=True), first):
            if not prompt:
                raise ValueError(f"Text {uid} has an empty prompt: give it at least one token.")
            if limit <= 0:
                raise ValueError(f"Text {uid}'s max_tokens is {limit}: it must be above 0.")
        own_caches = list(caches or [None] * n)
        for i, cache in enumerate(own_caches):
            if cache is None:
                own_caches[i] = compat.make_prompt_cache(self.model, self.max_kv_size)
        # mlx-lm's batches change these.
        held = [list(tokens) for tokens in all_tokens or ()]
        # The last argument has another name in 0.31.
        uids = super().insert_segments(
            parts, limits, own_caches, held, samplers, logits_processors, stops
        )
        for waiting in inner_batch.waiting_texts(self):
            if waiting.uid not in self._entries:
                self._entries[waiting.uid] = self._new_entry(waiting)
        return cast(list[int], uids)

    def _new_entry(self, waiting: inner_batch.Waiting) -> _Entry:
        shared = waiting.sampler is None
        sampler = waiting.sampler
        if shared:
            sampler = self.sampler
        why_dense = None
        if not are_known(waiting.cache):
            why_dense = UNKNOWN_CACHE
        prompt = [*waiting.held, *(token for part in waiting.segments for token in part)]
        text = Text(
            sampler,
            own_processors(waiting.processors or ()),
            mx.array(prompt, mx.int32),
            logprobs=self.logprobs,
            limit=waiting.max_tokens,
            uid=waiting.uid,
            ids_dtype=mx.int32,
            why_dense=why_dense,
        )
        text.shares_sampler = shared or compat.CALLS_SHARED_SAMPLERS_ONCE
        entry = _Entry(text, prompt, compat.as_stop_sequences(waiting.stops).matcher())
        if self._drafter is not None:
            entry.drafts = TrainedDrafts(self._drafter, self.model, self._n_drafts, list)
            if waiting.held:
                entry.drafts.hear(waiting.held, None)
        return entry

    def take_drafts(self, uid: int, drafts: TrainedDrafts) -> None:
        """Has a text guessed by drafts that have heard the tokens that its cache holds."""
        self._proposer.hear_states()
        self._entries[uid].drafts = drafts

    @contextmanager
    def _hearing(self, uids: list[int], tokens: list[list[int]]) -> Iterator[None]:
        """A block in which parts of prompts are read, one alone or several together.

        Of several the states are not heard, since they are padded.
        """
        states: list[mx.array] = []
        with self._proposer.reading(states):
            yield
        whole = None
        if len(uids) == 1 and states:
            whole = mx.concatenate(states, axis=1)[0]
        for uid, own in zip(uids, tokens, strict=True):
            drafts = self._entries[uid].drafts
            if drafts is not None and own:
                drafts.hear(own, whole)

    def next(self) -> tuple[list[Any], list[Response]]:
        """Takes a step, and returns responses of prompts and of texts.

        A text has one response for its next accepted token, and none if no token is accepted yet.
        """
        with self._proposer.reading():
            return cast(tuple[list[Any], list[Response]], super().next())

    def next_generated(self) -> list[Response]:
        """The next accepted tokens; nothing if there are no more texts."""
        while self._entries:
            _, responses = self.next()
            if responses:
                return responses
        return []

    def extract_cache(self, uids: list[int]) -> dict[int, Any]:
        """Copies of the caches of some texts, with the tokens in them."""
        with mx.stream(self.stream):
            return cast(dict[int, Any], super().extract_cache(uids))

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Removes texts. Returns, where wanted, their caches with the tokens in them."""
        with mx.stream(self.stream):
            held = super().remove(uids, return_prompt_caches)
        for uid in uids:
            self._entries.pop(uid, None)
        return cast(dict[int, Any], held)


def _check_lengths(n: int, **options: list[Any] | None) -> None:
    """Checks that each option that is given has an entry for each of ``n`` texts.

    Raises:
        ValueError: As from mlx-lm 0.32.
    """
    for name, entries in options.items():
        if entries and len(entries) != n:
            raise ValueError(
                f"Option {name} must have one entry per segment: expected {n}, got {len(entries)}."
            )


class _Prompts(compat.PromptProcessingBatch):
    """Prompts that are being read, and those of which only the last token is left."""

    # A block in which tokens of the prompts with these numbers are read.
    reading: Callable[[list[int], list[list[int]]], AbstractContextManager[None]] | None = None

    def prompt(self, tokens: list[list[int]]) -> None:
        """Reads the next tokens of each prompt."""
        block: AbstractContextManager[None] = nullcontext()
        if self.reading is not None:
            block = self.reading(self.uids, tokens)
        with block:
            super().prompt(tokens)

    def split(self, indices: list[int]) -> "_Prompts":
        """Takes some of the prompts out, and returns them."""
        taken = cast(_Prompts, super().split(indices))
        taken.reading = self.reading
        return taken

    def generate(self, tokens: list[list[int]]) -> "_Prompts":
        """Has texts begin with the last tokens (R, 1) of their prompts."""
        self.last = mx.array(tokens)
        return self


class _Generation:
    """The texts that are being decoded, in the place of mlx-lm's ``GenerationBatch``.

    Args:
        proposer: Proposes their tokens.
        entries: By number, those whose prompts are being read, too.
        announce: Called for each token with how it was decoded.
    """

    def __init__(
        self,
        proposer: Proposer,
        entries: dict[int, _Entry],
        announce: Callable[[Mode], object] | None,
    ):
        self._proposer = proposer
        self._entries = entries
        self._announce = announce
        self._decoder = Decoder(proposer, BatchCaches(self._feed))

    def _feed(self, tokens: mx.array, layers: list[Any]) -> mx.array:
        model: Any = self._proposer.model
        return cast(mx.array, model(tokens, cache=layers))

    def __len__(self) -> int:
        return len(self._decoder.texts)

    @property
    def uids(self) -> list[int]:
        return [text.uid for text in self._decoder.texts]

    @property
    def tokens(self) -> list[list[int]]:
        return [self._entries[uid].tokens for uid in self.uids]

    @property
    def prompt_cache(self) -> list[Any]:
        return self._decoder.caches.layers

    def extract_cache(self, idx: int) -> list[Any]:
        return self._decoder.handed_out_cache(self._decoder.texts[idx])

    def filter(self, keep: list[int]) -> None:
        texts = self._decoder.texts
        self._decoder.drop([text for index, text in enumerate(texts) if index not in keep])

    def extend(self, prompts: _Prompts) -> None:
        """Adds texts whose prompts have been read."""
        entries = [self._entries[uid] for uid in prompts.uids]
        texts = [entry.text for entry in entries]
        states: list[mx.array] = []
        with self._proposer.reading(states):
            logits = self._feed(prompts.last, prompts.prompt_cache)[:, -1, :]
        alone = None
        if len(entries) == 1 and not len(self):
            alone = prompts.prompt_cache
        for index, entry in enumerate(entries):
            state = None
            if states:
                state = states[-1][index]
            if entry.drafts is not None:
                self._begin_drafts(entry, state, alone)
        self._decoder.start(texts, prompts.prompt_cache, logits)

    def next(self) -> list[Response]:
        """Hands out tokens that are left from before, or else takes a step."""
        self._settle()
        responses = self._hand_out()
        if not responses:
            self._guess_for_one_alone()
            self._decoder.round()
            # A text that has no token yet leaves MLX's random state, too.
            for text in self._decoder.texts:
                text.leave_state()
            responses = self._hand_out()
        return responses

    def _settle(self) -> None:
        """Has texts that must not be ahead any more be as in mlx-lm's loop.

        A caller may have changed what one depends on. And where several draw from MLX's random
        state, their draws depend on when any other begins and ends.
        """
        decoder = self._decoder
        ahead = [text for text in decoder.texts if text.ahead]
        changed = [text for text in ahead if not text.undisturbed]
        n_drawing = sum(entry.text.draws_from_mlx for entry in self._entries.values())
        decoder.several_draw = n_drawing > 1
        settled = changed
        if decoder.several_draw:
            settled = ahead
        if settled:
            decoder.settle(settled)
        for text in changed:
            text.enter(Phase.DENSE, why=DISTURBED)

    def _begin_drafts(
        self, entry: _Entry, state: mx.array | None, layers: list[Any] | None
    ) -> None:
        """Lets a text be guessed at its first token.

        Args:
            entry: The text.
            state: (1, D), what its prompt's last token has left.
            layers: Its caches, if it is alone.
        """
        drafts = cast(TrainedDrafts, entry.drafts)
        drafts.caches = lambda: self._decoder.caches.layers
        *before, last = entry.prompt
        guesses = guesses_of(self._proposer, before, drafts, layers=layers, has_heard=True)
        self._decoder.take_guesses(entry.text, guesses)
        if guesses is not None:
            guesses.hear([last], state)
            # The layers are of another class once a text was taken back.
            if layers is not None:
                taken_back = [layer.extract(0) for layer in layers]
                established_costs(guesses.wide, self._decoder.caches.merged([taken_back]))

    def _guess_for_one_alone(self) -> None:
        """Gives a text that decodes alone what guesses its tokens, once."""
        text = self._decoder.texts[0]
        entry = self._entries[text.uid]
        if len(self) == 1 and not entry.decoded_alone and text not in self._decoder.guesses:
            entry.decoded_alone = True
            layers = None
            if text.n_yielded == 0:
                layers = self._decoder.caches.layers
            read = [*entry.prompt, *text.fed]
            guesses = guesses_of(self._proposer, read, layers=layers)
            self._decoder.take_guesses(text, guesses)

    def _hand_out(self) -> list[Response]:
        """Hands out one accepted token of each text that has one.

        Ended texts leave together, since mlx-lm's caches are copied each time.
        """
        responses = [self._response(text) for text in self._decoder.texts if text.ready]
        ended = [response for response in responses if response.finish_reason is not None]
        entries = [self._entries.pop(response.uid) for response in ended]
        for response, entry in zip(ended, entries, strict=True):
            response.prompt_cache = self._decoder.handed_out_cache(entry.text)
            response.all_tokens = entry.tokens
        self._decoder.drop([entry.text for entry in entries])
        return responses

    def _response(self, text: Text) -> Response:
        entry = self._entries[text.uid]
        pending = self._decoder.hand_out(text)
        token = cast(int, pending.token)
        if self._announce is not None:
            self._announce(mode_of(text, text.n_yielded))
        reason = None
        if entry.matcher.advance(token):
            reason = "stop"
        elif text.n_yielded >= text.limit:
            reason = "length"
        logprobs = pending.logprobs
        if logprobs is None:
            logprobs = NO_LOGPROBS
        return Response(
            uid=text.uid,
            token=token,
            logprobs=logprobs,
            finish_reason=reason,
            from_draft=bool(pending.guessed),
            match_sequence=getattr(entry.matcher, "match_sequence", None),
            current_state=getattr(entry.matcher, "current_state", None),
        )
