"""The guesses of one text: who guesses, and which offer is taken."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...head.backend import gpu_is_default
from ...models.trust import is_librarys_model
from ...wide.step import MAX_WIDTH, WideSteps, layout_of
from ...wide.trial import established_costs
from ..proposer import Proposer
from ..text import Text
from .depth import WORTH, Budget, Costs, Known, gain
from .forced_tokens import ForcedTokens
from .guesser import Guess, Guesser, LatestToken, Offer
from .lookup import LookupGuesser


class Guesses:
    """The guesses of one text.

    Args:
        wide: The wide steps of its model.
        guessers: Whoever guesses. Of offers that gain the same the first one's is taken.
        always: Guess wherever something is offered; otherwise where that is worth its time.
        quantized_from: The length from which the caches are quantized; None if they are not.
    """

    def __init__(
        self,
        wide: WideSteps,
        guessers: Iterable[Guesser],
        *,
        always: bool = False,
        quantized_from: int | None = None,
    ):
        self.wide = wide
        self._guessers = list(guessers)
        self._always = always
        self._quantized_from = quantized_from
        known = Known()
        for guesser in self._guessers:
            if guesser.known is not None and not always:
                known = guesser.known
        self._budget = Budget(known)
        # The costs of the latest offer that was taken.
        self._taken = Costs({})

    @property
    def wants_states(self) -> bool:
        """Whether the states are heard, too."""
        return any(guesser.wants_states for guesser in self._guessers)

    def best(self, text: Text, latest: LatestToken, layers: list[Any]) -> tuple[Offer, int] | None:
        """The offer that gains most behind the latest token.

        Args:
            text: The text.
            latest: Its latest token.
            layers: The text's caches.

        Returns:
            The offer, and how many of its tokens are taken; None where a single step is better, or
            nothing is offered.
        """
        offers = self._offers(text, latest)
        if self._always:
            offers = [replace(offer, cost=0.0) for offer in offers]
        taken = None
        if offers:
            taken = self._best(offers, self._costs(layers))
        if taken is None:
            self._budget.note(1, self._taken)
        return taken

    def _best(self, offers: list[Offer], costs: dict[int, float]) -> tuple[Offer, int] | None:
        """The offer that gains most, or one that is tried; and how many of its tokens."""
        if self._always:
            offer, width = best_offer(offers, costs, 0.0)
        else:
            offer, width = self._worth_their_time(offers, costs)
        self._taken = Costs(costs, offer.cost)
        if width == 1:
            return None
        return offer, width - 1

    def _worth_their_time(self, offers: list[Offer], costs: dict[int, float]) -> tuple[Offer, int]:
        """The offer that gains most, or one that is tried, and the tokens of its step."""
        budget = self._budget
        dearest = Costs(costs, max(offer.cost for offer in offers))
        affordable = budget.affordable(dearest).times
        offer, width = best_offer(offers, affordable)
        if width == 1:
            for each in offers:
                if each.guesser.known is not None:
                    offer = each
                    width = budget.tried(each.chances, Costs(affordable, each.cost))
        return offer, width

    def _offers(self, text: Text, latest: LatestToken) -> list[Offer]:
        offers = []
        for guesser in self._guessers:
            offer = guesser.offer(text, latest)
            if offer is None:
                continue
            # Others can only guess the same.
            if offer.chances[0] == 1:
                return [offer]
            offers.append(offer)
        return offers

    def judge(self, guess: Guess, n_right: int) -> None:
        """Notes how many tokens of a guess were right."""
        n = len(guess.tokens)
        guess.guesser.judge(n, n_right)
        self._budget.note(n + 1, self._taken, n_right)

    def hear(self, tokens: list[int], states: mx.array | None = None) -> None:
        """Has all hear the next tokens that the model has read.

        Args:
            tokens: n of them.
            states: (n, D), with what the head was called after each; None if they are not known.
        """
        for guesser in self._guessers:
            heard = None
            if guesser.wants_states:
                heard = states
            guesser.hear(tokens, heard)

    def take_back(self, n: int) -> None:
        """Has all hear that the last ``n`` tokens are not in the text."""
        if n > 0:
            for guesser in self._guessers:
                guesser.take_back(n)

    def leave(self) -> None:
        """Tells all that the text has ended behind the tokens that they have heard."""
        for guesser in self._guessers:
            guesser.leave()

    def _costs(self, layers: list[Any]) -> dict[int, float]:
        """The time of each established step, relative to a single one, from these caches on."""
        wide = self.wide
        if self._quantized_from is not None:
            lengths = [layer.offset for layer in layers if hasattr(layer, "to_quantized")]
            # mlx-lm quantizes the caches within the next steps.
            if max(lengths, default=0) >= self._quantized_from - MAX_WIDTH:
                return {}
        # A part of the model was changed.
        if not wide.parts.are_of(wide.model):
            return {}
        costs = wide.costs(layers)
        if self._always:
            return dict.fromkeys(costs, 1.0)
        return costs


def best_offer(
    offers: list[Offer], costs: Mapping[int, float], least: float = WORTH
) -> tuple[Offer, int]:
    """The offer, and how wide a step, that give most tokens for their time.

    Args:
        offers: At least one.
        costs: The time of a step by its number of tokens, relative to a single one.
        least: The tokens for the time of one that must be expected of a wide step.

    Returns:
        The offer and the tokens of the step; 1 of these if no wide one is worth it.
    """
    best = offers[0]
    best_width = 1
    most = least
    for offer in offers:
        for width in costs:
            if width - 1 > len(offer.chances):
                continue
            gained = gain(width, offer.chances, Costs(costs, offer.cost))
            if gained > most:
                best = offer
                best_width = width
                most = gained
    return best, best_width


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
    if not has_wide_steps(proposer.model, layers):
        raise ValueError(
            "`lookup` is 'on', but a step of several tokens does not leave this model's text as it "
            "is on this machine: give 'auto' or 'off'."
        )


def has_wide_steps(model: nn.Module, layers: list[Any]) -> bool:
    """Whether steps of several tokens are established for caches like these of a model.

    They may not fit the caches as they are, so that the next steps are single ones.
    """
    if not is_librarys_model(model):
        return False
    wide = WideSteps.of(model)
    established_costs(wide, layers)
    return bool(wide.established[layout_of(layers)].costs)


def _takes_guesses(proposer: Proposer) -> bool:
    return not proposer.unverified and not proposer.policy.lockstep


def guesses_of(
    proposer: Proposer,
    read: list[int],
    guesser: Guesser | None = None,
    quantized_from: int | None = None,
    layers: list[Any] | None = None,
    *,
    has_heard: bool = False,
) -> Guesses | None:
    """The guesses of a text.

    Args:
        proposer: Has its model and the settings.
        read: Tokens of it that its caches hold already.
        guesser: One that guesses, too.
        quantized_from: As of :class:`Guesses`.
        layers: Caches as the text has them at its first token. Wide steps are tried with them if
            nobody has: that takes seconds. None: the text has begun, and only what is known counts.
        has_heard: Whether the guesser has heard these tokens already.

    Returns:
        None where steps are single ones throughout.
    """
    lookup = proposer.settings.lookup
    # A CPU multiplies the tokens of a step one by one, so that it gains nothing.
    looks_up = lookup == "on" or (lookup == "auto" and gpu_is_default())
    wanted = guesser is not None or looks_up
    if not wanted or not _takes_guesses(proposer) or not is_librarys_model(proposer.model):
        return None
    wide = WideSteps.of(proposer.model)
    if layers is not None:
        established_costs(wide, layers)
    guessers: list[Guesser] = [ForcedTokens()]
    if looks_up:
        guessers.append(LookupGuesser())
    if guesser is not None:
        guessers.append(guesser)
    guesses = Guesses(wide, guessers, always=lookup == "on", quantized_from=quantized_from)
    for each in guessers:
        if read and not (has_heard and each is guesser):
            each.hear(read, None)
    return guesses
