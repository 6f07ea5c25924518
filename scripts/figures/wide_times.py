"""Estimates of a wide step's time on Apple chips, and of what prompt lookup gains by it.

A wide step feeds T tokens of a text and multiplies T states by each row of a layer, which it reads
once. Nothing is measured here. The rest is as in `step_times.py`.

    product = the weights' read, or (2 + 2 T) instructions a weight at 0.65 of the peak
    experts = T reads
    body    = products + experts + (kernels + 2 T for each layer) · launch
    head    = a dense one: its product, T times the logits; or T times FlashHead's
    step    = the device's time + the host's: what follows waits for its tokens
    gain    = tokens · dense / (single steps + wide steps of the T that gains most)
"""

import json
from functools import cache
from typing import NamedTuple

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

SHARED = 2  # instructions a weight, whatever the number of states: to unpack it
EACH = 2  # and for each state: to read its value and to multiply and add
REACHED = 0.65  # of the peak: fits what MLX's `qmv_wide` takes for 4 and 8 states
LAYER_LAUNCHES = 2  # of each token in a layer, an attention and where its result goes
WIDTHS = (2, 4, 8)  # tokens of a step
FIGURES = CHECKOUT / "docs" / "benchmarks" / "guesses.json"
MODEL = "Qwen2.5-Coder-1.5B-Instruct"  # does what the tasks ask


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


def wide_body_us(model: Model, chip: Chip, bits: int, width: int) -> float:
    """The device's time before the head."""
    us = product_us(chip, model.body - model.experts, bits, width)
    us += width * experts_us(model, chip, bits)
    n_kernels = model.kernels + LAYER_LAUNCHES * width * model.n_layers
    return us + n_kernels * chip.launch_us


def wide_device_us(model: Model, chip: Chip, body: int, head: int, width: int) -> float:
    """The device's time of a wide step, with the head that is faster."""
    dense = product_us(chip, model.head, head, width) + chip.us(width * model.logit_bytes)
    dense += model.dense_kernels * chip.launch_us + groups_us(model)
    flash = width * (flash_us(model, chip, body, head) - body_us(model, chip, body))
    return wide_body_us(model, chip, body, width) + min(dense, flash)


def wide_us(model: Model, chip: Chip, body: int, head: int, width: int) -> float:
    """A wide step: the host has its work before the device begins, since it waits for tokens."""
    device = wide_device_us(model, chip, body, head, width)
    host = host_us(model, chip, flash_head=True)
    return device + host + LAYER_LAUNCHES * width * model.n_layers * chip.host_us


def single_us(model: Model, chip: Chip, body: int, head: int) -> float:
    """A single step, with FlashHead where it pays."""
    dense = dense_us(model, chip, body, head)
    flash = flash_us(model, chip, body, head)
    return flash if dense / flash >= PAYS else dense


def cost(model: str, chip: str, head: int, width: int) -> float:
    """A wide step relative to a single one."""
    of = models()[model], chips()[chip], body_bits(model, head), head
    return wide_us(*of, width) / single_us(*of)


def lookup_gain(model: str, chip: str, head: int, kind: str = "repeats") -> float:
    """How many times as fast as mlx-lm's loop texts of a kind are, with the best width."""
    of = models()[model], chips()[chip], body_bits(model, head), head
    single = single_us(*of)
    gains = [dense_us(*of) / single]
    for text in measured(kind):
        us = (text.steps - text.wide) * single + text.wide * wide_us(*of, text.width)
        gains.append(text.tokens * dense_us(*of) / us)
    return max(gains)
