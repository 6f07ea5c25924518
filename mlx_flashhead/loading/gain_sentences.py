"""What is said of the speed that a FlashHead gives a model on this machine."""

import mlx.nn as nn

from ..decoding.policy import Tuning, least_gain
from ..head.matrix import Matrix
from ..models.finer_head import DEFAULT_BITS
from ..models.install import installed_head
from .estimated_gain import fine_gain


def why_dense(tuning: Tuning) -> str:
    """Says that a model stays dense: its FlashHead gains less than is needed."""
    if tuning.busy:
        return (
            "The machine is too busy to measure what FlashHead gains here: the model stays dense. "
            "Its next start measures again, if the machine is quieter. `flash_head_always=True` "
            "overrides it."
        )
    return (
        f"FlashHead would not make this model faster on this machine ({tuning.gain:.2f} x, and at "
        f"least {least_gain():g} x is needed): it stays dense. "
        "`flash_head_always=True` overrides it."
    )


def speed_text(tuning: Tuning | None) -> str:
    """A gain, and whether the model stays dense for it, such as "1.02 x (dense)"."""
    if tuning is None:
        return "not known yet"
    if tuning.busy:
        return "not known yet (dense, since the machine was busy)"
    speed = f"{tuning.gain:.2f} x"
    if tuning.dense:
        speed += " (dense)"
    return speed


def first_gain(model: nn.Module, tuning: Tuning, *, finer: bool = False) -> str:
    """Says how many times as fast a model is with FlashHead, and with ``fine_head``.

    Args:
        model: A model with an installed FlashHead.
        tuning: What was measured on this machine.
        finer: Whether the head is a finer one already.

    Returns:
        One or two sentences for one line; nothing that is said elsewhere, with figures.
    """
    rows = installed_head(model).clustered.rows
    advice = _advice(model, rows, tuning, finer)
    if tuning.dense:
        return advice
    gain = f"FlashHead makes this model {tuning.gain:.2f} times as fast here"
    return f"{gain}. {advice}".strip()


def _advice(model: nn.Module, rows: Matrix, tuning: Tuning, finer: bool) -> str:
    """What the bits of the head mean for the gain."""
    bits = rows.format.bits
    if finer:
        return f"It has a finer head of {bits} bits."
    if bits >= DEFAULT_BITS:
        if tuning.dense:
            return ""
        return f"Its head has {bits} bits already, the best case: it needs no `fine_head`."
    speed = fine_gain(model, tuning)
    return (
        f"Its head has {bits} bits: with `fine_head` its text gets better, at an estimated "
        f"{speed:.2f} times the speed of the normal head."
    )
