"""What is said once about a model: what its FlashHead gains here, and what a finer head would."""

import mlx.nn as nn

from ..decoding.policy import Tuning
from ..head.matrix import Matrix
from ..models.finer_head import DEFAULT_BITS
from ..models.install import installed_head
from .free_head import free_head_gain


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
    when = ", while the machine is busy" if tuning.busy else ""
    gain = f"FlashHead makes this model {tuning.gain:.2f} times as fast here{when}"
    return f"{gain}. {advice}".strip()


def _advice(model: nn.Module, rows: Matrix, tuning: Tuning, finer: bool) -> str:
    """What the bits of the head mean for the gain."""
    bits = rows.bits if rows.quantized else 8 * rows.weight.itemsize
    if finer:
        return f"It has a finer head of {bits} bits."
    if bits >= DEFAULT_BITS:
        best = f"Its head has {bits} bits already, the best case: it needs no `fine_head`."
        return "" if tuning.dense else best
    speed = fine_gain(model, tuning)
    return (
        f"Its head has {bits} bits: with `fine_head` its text gets better, at an estimated "
        f"{speed:.2f} times the speed of the normal head."
    )


def fine_gain(model: nn.Module, tuning: Tuning) -> float:
    """Estimates the speed with a head of 8 bits and FlashHead, relative to the head as it is.

    FlashHead reads the probed share of more bytes. Its verification is bound by arithmetic, which
    the bits do not change (docs/finer-head.md). A model that stays dense would use FlashHead then.
    """
    head = installed_head(model)
    rows = head.clustered.rows
    free = free_head_gain(model)
    head_share = 1 - 1 / free  # of a dense token's time, by bytes
    more = (DEFAULT_BITS + 0.5) / (rows.bits + 0.5) - 1  # scales and biases take half a bit
    probed = head.n_probes / head.n_clusters
    return 1 / (1 / tuning.gain + head_share * probed * more)
