"""Guesses of a text's next tokens. A wide step computes them all; they change nothing but the time.

What guesses: a grammar that allows one continuation alone, a draft model, or a lookup in the text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ...head.backend import gpu_is_default
from ...models.install import is_librarys_model
from ...wide.step import MAX_WIDTH, WideSteps
from ...wide.trial import established_costs
from ..proposer import Proposer
from ..sequence import Sequence as Text
from .draft_model import DraftModel
from .lookup import LENGTHS, Lookup

GRAMMAR = "grammar"
DRAFT = "draft model"
LOOKUP = "lookup"

# How often guesses are right that nobody has tried yet, by the length of the n-gram.
EXPECTED = {4: 0.6, 3: 0.4, 2: 0.2}
WEIGHT = 3.0  # guesses that this counts for
KEPT = 0.9  # share of what is known of guesses that each next one leaves
WORTH = 1.05  # tokens for the time of one from which a wide step is taken


class Guess(NamedTuple):
    """What may follow the latest token of a text."""

    tokens: mx.array  # (k,) uint32, which may not be computed yet
    source: str
    length: int = 0  # of the n-gram that was found


class Worth:
    """How often guesses of one kind were right in this text.

    Args:
        expected: The share that is expected before any was tried.
    """

    def __init__(self, expected: float):
        self._right = expected * WEIGHT
        self._wrong = (1 - expected) * WEIGHT

    def note(self, n_right: int, wrong: bool) -> None:
        """Notes how many tokens of a guess were right, and whether the next one was wrong."""
        self._right = self._right * KEPT + n_right
        self._wrong = self._wrong * KEPT + wrong

    @property
    def share(self) -> float:
        """The chance that the next token of a guess is right, if those before it are."""
        return self._right / (self._right + self._wrong)

    def best_width(self, costs: Mapping[int, float], n_unknown: int) -> int:
        """The tokens of the step that gives most tokens for its time; 1 if none is worth it.

        Args:
            costs: The time of a step by its number of tokens, relative to a single one.
            n_unknown: Tokens before the guess, 0 or 1, which must be as guessed, too.
        """

        def gain(width: int) -> float:
            """Tokens for the time of one."""
            n_right = sum(self.share ** (n_unknown + i) for i in range(1, width))
            return (1 + n_right) / costs[width]

        best = max(costs, key=gain, default=1)
        return best if costs and gain(best) > WORTH else 1


class Guesser:
    """Guesses the next tokens of one text.

    Args:
        wide: The wide steps of its model.
        prompt: The tokens before the text.
        always: Guess wherever something is found; otherwise where that is worth its time.
        draft: A draft model, which always guesses, in the place of a lookup.
        quantized_from: The length from which the caches are quantized; None if they are not.
    """

    def __init__(
        self,
        wide: WideSteps,
        prompt: Sequence[int],
        *,
        always: bool = False,
        draft: DraftModel | None = None,
        quantized_from: int | None = None,
    ):
        self.wide = wide
        self._always = always
        self._draft = draft
        self._quantized_from = quantized_from
        self._lookup = Lookup(prompt)
        self._n_prompt = len(prompt)
        self._n_rolled_back = 0  # of the text, when the lookup got its tokens
        self._worths = {length: Worth(EXPECTED[length]) for length in LENGTHS}
        self._watched = (0, 0, 0)  # a guess that was not taken: n-gram's length, place, and token

    def guess(
        self, text: Text, latest: mx.array, token: int | None, layers: list[Any]
    ) -> Guess | None:
        """Guesses what follows the latest token.

        Processors of a text need its latest token, so that it is read where something is found.

        Args:
            text: The text.
            latest: (1,), its latest token, which is launched.
            token: The same, if it is known.
            layers: The text's caches.

        Returns:
            As many tokens as pay; None where a single step is better, or nothing is found.
        """
        if not text.recognised:
            return None
        if token is None and text.forces_tokens:  # its mask waits for the token in any case
            token = cast(int, latest.item())
        self._learn(text, token)
        if token is not None and (forced := text.forced_tokens(token, MAX_WIDTH - 1)):
            width = max((w for w in self._costs(layers) if w <= len(forced) + 1), default=1)
            return _guess(forced, width, GRAMMAR)
        if self._draft is not None:
            most = self._draft.n_drafts + 1
            width = max((w for w in self._costs(layers) if w <= most), default=1)
            known = self._lookup.tokens if token is None else self._lookup.tokens[:-1]
            if width == 1:
                return None
            return Guess(self._draft.drafts(known, latest, width - 1, text), DRAFT)
        length, found = self._lookup.find(MAX_WIDTH)
        if length and token is None and text.current_processors:
            token = cast(int, latest.item())
            self._learn(text, token)
            length, found = self._lookup.find(MAX_WIDTH)
        if not length:
            return None
        n_unknown = int(token is None)
        self._watched = length, len(self._lookup.tokens), found[0]
        costs = self._costs(layers)
        width = self._worths[length].best_width(costs, n_unknown)
        if self._always:
            width = max(costs, default=1)
        return _guess(found[n_unknown:], width, LOOKUP, length)

    @property
    def drafts(self) -> bool:
        """Whether a draft model guesses."""
        return self._draft is not None

    def note(self, guess: Guess, n_accepted: int) -> None:
        """Notes how many tokens of a guess were right."""
        if guess.length:
            self._worths[guess.length].note(n_accepted, n_accepted < len(guess.tokens))
            self._watched = (0, 0, 0)
        if self._draft is not None and guess.source == DRAFT:
            self._draft.note(n_accepted)

    def _learn(self, text: Text, token: int | None) -> None:
        """Takes the tokens that are known by now, and sees what a guess would have been worth."""
        known = self._lookup
        if self._n_rolled_back != text.n_rolled_back:
            self._n_rolled_back = text.n_rolled_back
            known.truncate(self._n_prompt + text.n_yielded)
        n_held = len(known.tokens) - self._n_prompt
        read = [cast(int, pending.token) for pending in text.pending[: text.n_read]]
        tokens = [*text.tokens[n_held:], *read[max(n_held - len(text.tokens), 0) :]]
        if token is not None and n_held + len(tokens) < text.n_chosen:
            tokens.append(token)
        known.extend(tokens)
        length, place, guessed = self._watched
        if length and place < len(known.tokens):
            right = known.tokens[place] == guessed
            self._worths[length].note(int(right), not right)
            self._watched = (0, 0, 0)

    def _costs(self, layers: list[Any]) -> dict[int, float]:
        """The time of each established step, relative to a single one, from these caches on."""
        wide = self.wide
        limit = math.inf if self._quantized_from is None else self._quantized_from - MAX_WIDTH
        lengths = [layer.offset for layer in layers if hasattr(layer, "to_quantized")]
        # mlx-lm quantizes the caches within the next steps, or a part of the model was changed
        if max(lengths, default=0) >= limit or not wide.parts.are_of(wide.model):
            return {}
        costs = established_costs(wide, layers)
        return dict.fromkeys(costs, 1.0) if self._always else costs


def check_lookup(proposer: Proposer, layers: list[Any]) -> None:
    """Checks that a lookup that is asked for has wide steps.

    Args:
        proposer: Has the model and the settings.
        layers: Caches of a text.

    Raises:
        ValueError: If none are established.
    """
    if proposer.settings.lookup != "on" or not _takes_guesses(proposer):
        return
    model = proposer.model
    if not is_librarys_model(model) or not established_costs(WideSteps.of(model), layers):
        raise ValueError(
            "`lookup` is 'on', but a step of several tokens does not leave this model's text as it "
            "is on this machine: give 'auto' or 'off'."
        )


def _takes_guesses(proposer: Proposer) -> bool:
    return not proposer.unverified and not proposer.policy.lockstep


def guesser_of(
    proposer: Proposer,
    prompt: list[int],
    *,
    draft: DraftModel | None = None,
    quantized_from: int | None = None,
) -> Guesser | None:
    """The guesser of a text that is about to begin.

    Args:
        proposer: Has its model and the settings.
        prompt: The tokens before it.
        draft: A draft model, if there is one.
        quantized_from: As of :class:`Guesser`.

    Returns:
        None where steps are single ones throughout.
    """
    settings = proposer.settings
    # a CPU multiplies the tokens of a step one by one, so that it gains nothing
    looks_up = settings.lookup == "on" or (settings.lookup == "auto" and gpu_is_default())
    wanted = draft is not None or looks_up
    if not wanted or not _takes_guesses(proposer) or not is_librarys_model(proposer.model):
        return None
    return Guesser(
        WideSteps.of(proposer.model),
        prompt,
        always=settings.lookup == "on" or draft is not None,
        draft=draft,
        quantized_from=quantized_from,
    )


def _guess(tokens: list[int], width: int, source: str, length: int = 0) -> Guess | None:
    if width < 2:
        return None
    return Guess(mx.array(tokens[: width - 1], mx.uint32), source, length)
