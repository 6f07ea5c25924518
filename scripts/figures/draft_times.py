"""Estimates of what trained drafters gain on Apple chips: docs/speed.md, README.md.

A round makes T - 1 drafts and a wide step of T tokens. Nothing is measured here. The rest is as in
`wide_times.py`.

    draft = (drafter's weights + head) / bandwidth + kernels · (launch + host)
    head  = dense: its rows, and the choice among V logits; FlashHead's: a tenth of its bytes
    round = wide step of T + (T - 1) · draft + the chance that one is wrong · partly
    gain  = (1 + p1 + … + p1 … p(T-1)) · dense / round, and the best T of 2, 3, 4, 8

The host makes the graphs of the drafts and of the step behind them before the device begins.
"""

from functools import cache
from typing import NamedTuple

from mlx_flashhead.decoding.guessing.depth import MAX_GUESSES, Costs, best_width, gain
from mlx_flashhead.wide.step import WIDTHS
from step_times import (
    BARRIER_US,
    BARRIERS,
    BYTES,
    FLASH_HEAD_KERNELS,
    GATHER,
    GROUP_GB_S,
    Chip,
    Model,
    chips,
    dense_us,
    models,
    rows,
)
from wide_times import CONTEXT, single_us, wide_us, wrong_us

# Bits.
BODY = 4
# A drafter has two norms, their concatenation, a projection, and a norm at the end.
INPUT_KERNELS = 5
# Each of its layers has so many kernels.
LAYER_KERNELS = 17
# They are the product and its best token.
DENSE_CHOICE = 2
# A draft reads this share of a head's rows, beside the centroids of 16 rows each.
FEW_ROWS = 0.1 - 1 / 16


class Drafter(NamedTuple):
    """A drafter of a model, and the shares of its drafts that others have published.

    Attributes:
        weights: The weights that a draft reads, beside a head.
        own_head: Weights of a head of its own, else 0.
        shares: Accepted shares by depth. Deeper ones are assumed to be as the last.
    """

    model: str
    drafter: str
    weights: int
    bits: int
    layers: int
    own_head: int
    shares: tuple[float, ...]
    measured_on: str
    source: str

    def head_bytes(self, model: Model, head: int) -> float:
        """The bytes of the dense head that scores its drafts."""
        if self.own_head:
            return self.own_head * BYTES[16]
        return model.head * BYTES[head]


@cache
def drafters() -> dict[str, Drafter]:
    """The drafters of drafters.csv, by their models."""
    found = {}
    for row in rows("drafters"):
        row["shares"] = tuple(map(float, str(row["shares"]).split()))
        found[row["model"]] = Drafter(**row)
    return found


def by_depth(shares: tuple[float, ...]) -> list[float]:
    """Shares of all depths, of which the deeper ones are as the last."""
    deeper = [shares[-1] for _ in range(MAX_GUESSES - len(shares))]
    return [*shares[:MAX_GUESSES], *deeper]


def draft_us(model: Model, drafter: Drafter, chip: Chip, head: int, few: bool) -> float:
    """The time of a draft.

    Args:
        model: The target.
        drafter: Its drafter.
        chip: The chip.
        head: The bits of the target's head.
        few: Whether a FlashHead scores it.
    """
    dense = drafter.head_bytes(model, head)
    us = chip.us(drafter.weights * BYTES[drafter.bits])
    kernels = INPUT_KERNELS + LAYER_KERNELS * drafter.layers
    if few:
        clusters = model.vocab_size / 16
        bits = head
        if drafter.own_head:
            bits = 16
        centroids = dense / 16 * BYTES[4] / BYTES[bits] + 4 * clusters
        us += chip.us(centroids + FEW_ROWS * dense / GATHER)
        scores = clusters * (1 + 16 * FEW_ROWS)
        us += 4 * scores / GROUP_GB_S / 1e3 + BARRIERS * BARRIER_US
        kernels += FLASH_HEAD_KERNELS
    else:
        us += chip.us(dense + 2 * model.vocab_size) + 2 * model.vocab_size / GROUP_GB_S / 1e3
        kernels += DENSE_CHOICE
    return us + kernels * (chip.launch_us + chip.host_us)


def draft_costs(model: str, chip: str, head: int, few: bool) -> Costs:
    """The times of wide steps and drafts relative to a single step."""
    of = models()[model], chips()[chip]
    single = single_us(*of, BODY, head)
    return Costs(
        {width: float(wide_us(*of, BODY, head, width) / single) for width in WIDTHS},
        draft=float(draft_us(of[0], drafters()[model], of[1], head, few) / single),
        wrong=float(wrong_us(*of) / single),
    )


def drafted_gain(
    model: str, chip: str, head: int, few: bool, shares: tuple[float, ...]
) -> tuple[float, int]:
    """How many times as fast as mlx-lm's loop a model with its drafter is, and the best T."""
    of = models()[model], chips()[chip], BODY, head
    costs = draft_costs(model, chip, head, few)
    chances = by_depth(shares)
    alone = dense_us(*of, context=CONTEXT) / single_us(*of)
    width = best_width(chances, costs)
    if width > 1:
        alone *= gain(width, chances, costs)
    return alone, width
