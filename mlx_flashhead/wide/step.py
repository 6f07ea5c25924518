"""A wide step: several tokens of one text at once, with the bits of single steps.

    steps = WideSteps.of(model)
    costs = established_costs(steps, caches)        # of trial.py, such as {2: 1.1, 4: 1.4}
    step = steps.feed(tokens, caches)               # (1, T) → step.logits (1, T, V), lazy
    step.back_to(n)                                 # the caches after the first n of the tokens

Hidden states and caches are those that T single steps would leave, where that is established. So a
guess changes nothing but the time. Whoever wants the states takes them where the FlashHead is
called, as in single steps.
"""

import logging
import weakref
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from ..common.stored import Positive
from ..models.compat.mlx_lm import ArraysCache
from .parts import ModelParts
from .stand_ins import ENDING, fit, has_stand_in, is_past_end, parts_of, stand_in, states_in
from .states import StateStandIn, Step, run_as
from .twin import NoWideStepError, twin_of

# Tokens of a step, 3 for two drafts: for each a GPU compiles kernels.
WIDTHS = (2, 3, 4, 8)
MAX_WIDTH = WIDTHS[-1]
# A width in a stored file.
Width = Annotated[int, Meta(ge=2, le=MAX_WIDTH)]
# What kernels go by, of the attributes that a cache may have.
SETTINGS = ("max_size", "keep", "bits", "group_size", "chunk_size")
log = logging.getLogger("mlx_flashhead")


# The times of steps, relative to a single one, by their numbers of tokens.
StepTimes = dict[Width, Positive]


class Established(NamedTuple):
    """What holds for caches of a layout. It can be stored as JSON.

    Attributes:
        costs: Of each step that leaves the bits of single ones.
        apart: Whether each operation of an attention runs once per position.
        costs_past_end: Of each step that writes over positions of a window.
        lengths: Of the texts after which it was tried.
        busy: Whether the machine was busy meanwhile.
    """

    costs: StepTimes
    apart: bool = False
    costs_past_end: StepTimes | None = None
    lengths: tuple[int, ...] = ()
    busy: bool = False


NOTHING = Established({})


class WideSteps:
    """The wide steps of a model as it is now.

    Attributes:
        known: Those of the models that are in use, by the ids of these.
        parts: All parts of the model, so that a change shows.
        established: What holds, by the layout of the caches.
        model_changes_itself: Whether the model's own steps replace parts by others, so that nothing
            shows who else does; None: no step was taken yet to find out.
    """

    known: ClassVar[dict[int, "WideSteps"]] = {}

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self.parts = ModelParts(model)
        # Twins by whether their attentions take positions apart.
        self._twins: dict[bool, nn.Module] = {}
        self.established: dict[str, Established] = {}
        self.model_changes_itself: bool | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "WideSteps":
        """The wide steps of a model, anew if a part of it has changed."""
        known = cls.known.get(id(model))
        if known is not None and (known.model_changes_itself or known.are_up_to_date):
            return known
        if known is None:
            weakref.finalize(model, cls.known.pop, id(model), None)
        cls.known[id(model)] = cls(model)
        return cls.known[id(model)]

    @property
    def model(self) -> nn.Module:
        """The model, which must still be in use."""
        return cast(nn.Module, self._model())

    @property
    def twins(self) -> list[nn.Module]:
        """The model's twins that take wide steps."""
        forms = {held.apart for held in self.established.values() if held.costs}
        return [self.twin(apart=apart) for apart in forms]

    @property
    def are_up_to_date(self) -> bool:
        """Whether nothing of the model has changed, between two texts."""
        return self.parts.are_of(self.model) and self.parts.renewed_are_equal()

    def twin(self, *, apart: bool) -> nn.Module:
        """The model's twin."""
        if apart not in self._twins:
            self._twins[apart] = twin_of(self.model, apart=apart)
        return self._twins[apart]

    def costs(self, caches: list[Any]) -> dict[int, float]:
        """The times of the wide steps that are established from these caches on.

        They are relative to a single step, by their numbers of tokens. Nothing is tried.
        """
        held = self.established.get(layout_of(caches), NOTHING)
        ending = [cache for cache in parts_of(caches) if type(cache) in ENDING]
        costs = {}
        for n in held.costs:
            found: StepTimes | None = held.costs
            if any(is_past_end(cache, n) for cache in ending):
                found = held.costs_past_end
            if found is not None and n in found and fit(ending, n):
                costs[n] = found[n]
        return costs

    def feed(self, tokens: mx.array, caches: list[Any]) -> "WideStep":
        """Feeds tokens (1, T) of a text, as T single steps would, without evaluating anything.

        Args:
            tokens: Of an established width; they may not be computed yet.
            caches: The text's caches, which hold the tokens then.

        Raises:
            NoWideStepError: If the model does at these positions what it did not in the trial. The
                caches are unchanged, and there are no more wide steps with caches like these.
        """
        layout = layout_of(caches)
        try:
            return self.feed_by(self.twin(apart=self.established[layout].apart), tokens, caches)
        except NoWideStepError as error:
            log.info("Steps of several tokens are off: %s", error)
            self.established[layout] = NOTHING
            raise

    def feed_by(self, model: Any, tokens: mx.array, caches: list[Any]) -> "WideStep":
        """Feeds tokens to a twin."""
        n_tokens = tokens.shape[1]
        stand_ins = [stand_in(cache, n_tokens) for cache in caches]
        given = [each.given for each in stand_ins]
        states = list(states_in(stand_ins))
        # A model may raise anything.
        try:
            if states:
                logits = _logits_and_states(model, tokens, given, states)
            else:
                logits = model(tokens, cache=given)
        except Exception as error:
            for each in stand_ins:
                each.back_to(0)
            raise NoWideStepError(f"{type(error).__name__}: {error}".split("\n")[0]) from error
        return WideStep(logits, n_tokens, caches, stand_ins)


@dataclass
class WideStep:
    """A step that has fed tokens, which can be taken back from the caches' end.

    Whoever holds it holds what a window was before: it should be let go before the next step.

    Attributes:
        logits: (1, T, V), not computed yet.
        n_tokens: T.
    """

    logits: mx.array
    n_tokens: int
    _caches: list[Any]
    _stand_ins: list[Any]

    def back_to(self, n: int) -> list[Any]:
        """Leaves in the caches the first ``n`` of the step's tokens. It reads no weight.

        It may be called again for fewer.

        Returns:
            The caches of the layers.
        """
        if n < self.n_tokens:
            for each in self._stand_ins:
                each.back_to(n)
        return self._caches


def _logits_and_states(
    model: Any, tokens: mx.array, caches: list[Any], states: list[StateStandIn]
) -> mx.array:
    """The logits (1, T, V) of a step in which layers write states."""
    step = Step(states)
    with run_as(step):
        logits: mx.array = model(tokens, cache=caches)
    if not step.explains_states:
        raise NoWideStepError("A state is written by no layer that gets it.")
    return logits


def layout_of(caches: list[Any]) -> str:
    """What matters of caches to the kernels that read them, in words."""
    layouts = [_layout(cache) for cache in caches]
    return ", ".join(f"{layouts.count(layout)} {layout}" for layout in dict.fromkeys(layouts))


def _layout(cache: Any) -> str:
    parts = [_layout(part) for part in getattr(cache, "caches", ())]
    if not parts and not has_stand_in(cache):
        return "unknown"
    held = vars(cache)
    settings = [f"{name}={held[name]}" for name in SETTINGS if name in held]
    if type(cache) is ArraysCache and cache.left_padding is not None:
        settings.append("padded")
    return f"{type(cache).__name__}({', '.join([*parts, *settings])})"
