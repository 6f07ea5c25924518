"""How a proposal is made, as a function of arrays that MLX traces once."""

import threading
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

from .adjustment import Adjustment
from .draws.draw import Draw, Draws
from .logit_map import LogitMap
from .operations import PortableOperations, Risk

# So many functions are kept.
MOST_TRACED = 64

Traced = Callable[..., tuple[mx.array, ...]]


class ProposalFunction(NamedTuple):
    """The operations of proposals, as a function of arrays. Equal ones need one trace.

    Attributes:
        operations: Of the head.
        risk: Estimates the risk by what was not scored.
        n_probes: Clusters that are scored.
        depth: Nats of the model's logits below the mass of all, from which kernels leave clusters
            out.
        structure: How each token is drawn, as :meth:`PortableOperations.structure_of` says it.
        logit_map: What the model does to each of its head's logits.
        most_occurrences: Of the adjustment; None without one.
    """

    operations: PortableOperations
    risk: Risk
    n_probes: int
    depth: float
    structure: tuple[Draw, ...]
    logit_map: LogitMap
    most_occurrences: int | None

    def __call__(
        self,
        hidden: mx.array,
        draw_inputs: tuple[mx.array, mx.array, mx.array],
        adjusted: list[mx.array],
        allowed: list[mx.array],
    ) -> tuple[mx.array, ...]:
        """Proposes for states.

        Args:
            hidden: (R, D), the states.
            draw_inputs: Of their draws.
            adjusted: The words and the latest tokens of an adjustment; empty without one.
            allowed: A mask; empty without one.

        Returns:
            The tokens, probes, logits and risks.
        """
        operations = self.operations
        draws = Draws(self.structure, draw_inputs)
        adjustment = None
        if self.most_occurrences is not None:
            adjustment = Adjustment(adjusted[0], adjusted[1], self.most_occurrences)
        selection = operations.select(
            operations.route(hidden),
            self.n_probes,
            words=False,
            depth=self.depth / self.logit_map.slope,
            logit_map=self.logit_map,
            adjustment=adjustment,
            mass=not draws.all_greedy,
        )
        candidates = operations.score(hidden, selection, self.logit_map)
        mask = None
        if allowed:
            mask = allowed[0]
        if adjustment is not None or mask is not None:
            candidates = operations.adjust(selection, candidates, adjustment, mask)
        tokens, risk = operations.choose(
            selection, candidates, draws, self.risk, self.logit_map, masked=mask is not None
        )
        # The probes that a kernel repeats are left out.
        probes = selection.probes[:, : self.n_probes]
        logits = candidates.logits[:, : self.n_probes]
        return tokens, probes, logits, risk


class TracedFunctions:
    """Functions of proposals that MLX has traced, and those of each thread for itself.

    MLX keeps the traces of threads apart. Those of a function that several had called would stay
    when it is gone, for the next one in its place.

    Attributes:
        n_traced: Functions made so far, each of which takes MLX a while.
    """

    def __init__(self) -> None:
        self.n_traced = 0
        self._of_thread = _TracesOfThread()

    def of(self, function: ProposalFunction) -> Traced:
        """The traced function of these operations."""
        of_thread = self._of_thread
        # Comparing takes a fraction of the time that its hash takes.
        if function == of_thread.latest:
            return cast(Traced, of_thread.latest_traced)
        known = of_thread.traced
        if function not in known:
            while len(known) >= MOST_TRACED:
                del known[next(iter(known))]
            self.n_traced += 1
            known[function] = cast(Traced, mx.compile(function.__call__))
        of_thread.latest = function
        of_thread.latest_traced = known[function]
        return known[function]


class _TracesOfThread(threading.local):
    """What each thread has traced."""

    def __init__(self) -> None:
        self.traced: dict[ProposalFunction, Traced] = {}
        # The function that was used last.
        self.latest: ProposalFunction | None = None
        self.latest_traced: Traced | None = None
