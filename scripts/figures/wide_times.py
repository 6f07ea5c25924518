"""Estimates of a wide step's time on Apple chips, and of what prompt lookup gains by it.

A wide step feeds T tokens of a text and multiplies T states by each row of a layer, which it reads
once. Nothing is measured here. The rest is as in `step_times.py`, after CONTEXT tokens.

    product  = the weights' read, or 2 + T (1.25 + 3 / A) instructions a weight at 0.65 of the peak
    experts  = T reads
    caches   = T reads of the keys and values; past its end a window is copied T times
    body     = products + experts + caches
               + (kernels + 2 T a layer, 6 T where its window is copied) · launch
    head     = a dense one: its product, T times the logits; or T times FlashHead's
    step     = the device's time + the host's: what follows waits for its tokens
    partly   = after a wrong guess a linear attention's state is made anew: read and written once
    gain     = tokens · dense / (single steps + wide steps of the T that gains most)
"""

import json
from functools import cache
from typing import NamedTuple

from mlx_flashhead.decoding.guessing.depth import WORTH
from pages import CHECKOUT
from step_times import (
    BYTES,
    GATHER,
    PAYS,
    Chip,
    Model,
    body_bits,
    body_us,
    chips,
    dense_us,
    flash_us,
    groups_us,
    host_us,
    models,
)

# So many tokens stand before the text: a file that is edited, past the end of usual windows.
CONTEXT = 2048
# To unpack a weight takes so many instructions, whatever the number of states.
SHARED = 2
# A simdgroup has so many rows, of 4 and 8 affine bits (head/row_products.py).
AT_ONCE = 4
# So many instructions each state takes: to multiply and add, to load and convert its value.
EACH = 1.25 + 3 / AT_ONCE
# This share of the peak fits what MLX's `qmv_wide` takes for 4 and 8 states.
REACHED = 0.65
# Each token has so many in a layer: an attention and where its result goes.
LAYER_LAUNCHES = 2
# There are more where a window is copied: keys and values are copied and written.
COPY_LAUNCHES = 4
# So many launches make a linear attention's state anew.
STATE_LAUNCHES = 2
# So many tokens a step are tried.
WIDTHS = (2, 4, 8)
FIGURES = CHECKOUT / "docs" / "benchmarks" / "guesses.json"
# This model does what the tasks ask.
MODEL = "Qwen2.5-Coder-1.5B-Instruct"


class Steps(NamedTuple):
    """The steps of some texts with up to ``width`` tokens a step."""

    width: int
    tokens: int
    steps: int
    wide: int


@cache
def measured(kind: str) -> tuple[Steps, ...]:
    """The steps of all texts of a kind together, by their width."""
    cases = json.loads(FIGURES.read_text(encoding="utf-8"))["cases"]
    found = [case["widths"] for case in cases if (case["model"], case["kind"]) == (MODEL, kind)]
    return tuple(
        Steps(int(width), *(sum(of[width][key] for of in found) for key in Steps._fields[1:]))
        for width in found[0]
    )


def product_us(chip: Chip, n_weights: float, bits: float, width: int) -> float:
    """The time of rows with so many weights times ``width`` states."""
    instructions = n_weights * (SHARED + EACH * width)
    return max(chip.us(n_weights * BYTES[bits]), instructions / chip.instructions_us / REACHED)


def experts_us(model: Model, chip: Chip, bits: int) -> float:
    """The time of a token's experts."""
    return chip.us(model.experts * BYTES[model.expert_bits or bits] / GATHER)


def wide_launches(model: Model, width: int, context: int) -> int:
    """Kernels that a wide step has beside those of a single one, before the head.

    Layers with a linear attention are counted like others, which fits what was measured.
    """
    copied = 0
    if context > model.window:
        copied = model.window_layers
    return width * (LAYER_LAUNCHES * model.n_layers + COPY_LAUNCHES * copied)


def caches_us(model: Model, chip: Chip, width: int, context: int) -> float:
    """The time of reading the keys and values for each token, and of copying windows."""
    n_bytes = width * model.cache_bytes(context)
    if context > model.window:
        n_bytes += 2 * width * model.window_bytes(context)
    return chip.us(n_bytes)


def wide_body_us(model: Model, chip: Chip, bits: int, width: int, context: int = CONTEXT) -> float:
    """The device's time before the head."""
    us = product_us(chip, model.body - model.experts, bits, width)
    us += width * experts_us(model, chip, bits)
    us += caches_us(model, chip, width, context)
    n_kernels = model.kernels + wide_launches(model, width, context)
    return us + n_kernels * chip.launch_us


def wrong_us(model: Model, chip: Chip) -> float:
    """The time that a partly wrong guess takes beside its step."""
    states = 2 * 4 * model.state_layers * model.state_values
    launches = STATE_LAUNCHES * model.state_layers
    return chip.us(states) + launches * (chip.launch_us + chip.host_us)


def wide_device_us(
    model: Model, chip: Chip, body: int, head: int, width: int, context: int = CONTEXT
) -> float:
    """The device's time of a wide step, with the head that is faster."""
    dense = product_us(chip, model.head, head, width) + chip.us(width * model.logit_bytes)
    dense += model.dense_kernels * chip.launch_us + groups_us(model)
    flash = width * (flash_us(model, chip, body, head) - body_us(model, chip, body))
    return wide_body_us(model, chip, body, width, context) + min(dense, flash)


def wide_us(
    model: Model, chip: Chip, body: int, head: int, width: int, context: int = CONTEXT
) -> float:
    """A wide step: the host has its work before the device begins, since it waits for tokens."""
    device = wide_device_us(model, chip, body, head, width, context)
    host = host_us(model, chip, flash_head=True)
    return device + host + wide_launches(model, width, context) * chip.host_us


def single_us(model: Model, chip: Chip, body: int, head: int, context: int = CONTEXT) -> float:
    """A single step, with FlashHead where it pays."""
    dense = dense_us(model, chip, body, head, context=context)
    flash = flash_us(model, chip, body, head, context=context)
    if dense / flash >= PAYS:
        return flash
    return dense


def cost(model: str, chip: str, head: int, width: int, context: int = CONTEXT) -> float:
    """A wide step relative to a single one."""
    of = models()[model], chips()[chip], body_bits(model, head), head
    return wide_us(*of, width, context) / single_us(*of, context)


def lookup_gain(model: str, chip: str, head: int, kind: str = "repeats") -> float:
    """How many times as fast as mlx-lm's loop texts of a kind are, with the best width.

    Each step with a guess is counted as a partly wrong one. A width that would not pay if all
    guesses were right is not taken.
    """
    of = models()[model], chips()[chip], body_bits(model, head), head
    single = single_us(*of)
    dense = dense_us(*of, context=CONTEXT)
    gains = [dense / single]
    for text in measured(kind):
        wide = wide_us(*of, text.width) + wrong_us(*of[:2])
        if text.width * single > WORTH * wide:
            us = (text.steps - text.wide) * single + text.wide * wide
            gains.append(text.tokens * dense / us)
    return max(gains)
