"""Whether proposed tokens are the dense choices: the dense rows' answer, and how sure it is.

The rows are multiplied with the states of all proposals at once, which rounds otherwise than the
product of a state alone. So a token is accepted only where it is the dense choice whatever the
logits are within the bounds of that rounding.
"""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from .clustered import in_token_order
from .draws.draw import Draws
from .logit_map import LogitMap
from .operations import PortableOperations
from .proposal import Proposal
from .rounded_product import Rounding, SlotProduct, Stretch, stretched


class Verdict:
    """Says which of k proposed tokens are accepted. The others are in doubt.

    The dense product of a doubt's state alone decides whether its token is rejected. All is
    launched as soon as the product is there. :meth:`in_doubt` alone waits for it.

    Args:
        operations: Of the head.
        proposal: Of k positions.
        draws: How each token is drawn.
        product: Of the rows and the k states.
        rounding: How far its logits may be off.
        stretches: What biases and penalties have made of the distances of each position's logits.
        logit_map: What the model does to each of its head's logits.
        allowed: (k, ⌈V/32⌉) uint32, a bit a token, whether it may be chosen; None where all may.

    Attributes:
        certain: (k,) bool, whether each token is accepted, lazy; None while the product is not
            there.
    """

    def __init__(
        self,
        operations: PortableOperations,
        proposal: Proposal,
        draws: Draws,
        product: SlotProduct,
        rounding: Rounding,
        stretches: Sequence[Stretch],
        logit_map: LogitMap,
        allowed: mx.array | None,
    ):
        self.certain: mx.array | None = None
        self._operations = operations
        self._proposal = proposal
        self._draws = draws
        self._product = product
        self._rounding = rounding
        self._stretches = stretches
        self._logit_map = logit_map
        self._allowed = allowed
        self._slots: mx.array | None = None
        if product.ready:
            self._screen()

    @property
    def ready(self) -> bool:
        """Whether :meth:`in_doubt` does not wait for a thread."""
        return self._product.ready

    def in_doubt(self) -> list[bool]:
        """Returns whether each of the k tokens is in doubt. Evaluates."""
        if self.certain is None:
            self._screen()
        certain = cast(list[bool], cast(mx.array, self.certain).tolist())
        return [not each for each in certain]

    def logits(self, position: int) -> mx.array:
        """The model's logits (1, V) at a position, by the product of all states. Lazy."""
        if self._slots is None:
            self._screen()
        slots = cast(mx.array, self._slots)[position : position + 1]
        logits = in_token_order(slots.flatten(1), self._operations.clustered.slot_of)
        return self._logit_map(logits)

    def _screen(self) -> None:
        """Judges the tokens by the product. Waits if a thread computes it."""
        slots = self._product.result()
        proposal = self._proposal
        rounding = self._rounding
        tolerance = rounding.tolerance(proposal.hidden, self._operations)
        if rounding.scored:
            scored = stretched(tolerance.scored, proposal.logits, self._stretches, rounding.epsilon)
            tolerance = tolerance._replace(scored=scored)
        screen = self._operations.screen(
            slots,
            proposal,
            self._draws,
            tolerance,
            rounding.epsilon,
            self._logit_map,
            self._allowed,
        )
        self._slots = slots
        self.certain = screen.certain
        mx.async_eval(self.certain)
