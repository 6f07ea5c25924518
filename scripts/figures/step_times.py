"""Estimates of a decode step's time on Apple chips, dense and with FlashHead.

One sequence, a short context (no bytes of the cache, unless a number of tokens is given), a model
that fits into memory, an idle machine. Nothing is measured here: times are counted from bytes and
kernels.

    dense     = (body + rows + logits) / bandwidth + kernels · launch
                + logsumexp + argmax (+ softcap) (+ sort)
    FlashHead = (body + centroids + probed rows / g) / bandwidth + kernels · launch + select
                + verification + wasted steps + doubts
    step      = the device's time or the host's, whichever is longer
    verification of k states, a k-th part of it for each token:
                product + (write + read of k rows of logits) / bandwidth + its launches
    product   = of 1, 2, 4, 8, 16 or 32 states: as many reads of the rows, or fewer, up to the
                limit of MLX's vector kernels, else
                max(rows / bandwidth, 2 · 32 · V · D / arithmetic)

The public speeds of dense models in apple_estimates/speeds.csv fit four constants by least squares
of relative errors: the share of Apple's bandwidth that is reached, on an Ultra too, and the time of
a kernel, on M1 and M2 too. Steps that wait for the host are left out of the fit.

Bodies: `kernels.py` counts the kernels in the graphs of mlx-lm's code. A mixture of experts reads
those of a token alone, with its router and its shared experts, and gathers them at ``g`` of a plain
read. Gemma 4's small models read one row of the embedding of their per-layer inputs, which is not
counted. A softcap is a pass of the dense side; within FlashHead's kernels it adds none.
"""

import csv
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA = Path(__file__).with_name("apple_estimates")
# The bytes of a weight by its bits, in groups of 64.
BYTES = {4: 0.5625, 5: 0.6875, 6: 0.8125, 8: 1.0625, 16: 2.0}
# This is mxfp4.
BYTES[4.25] = 0.53125
# They are the product, logsumexp, the log-probabilities and argmax.
DENSE_KERNELS = 4
# So many of these have one threadgroup over all logits.
DENSE_GROUPS = 2
# They are route, select, score and sample.
FLASH_HEAD_KERNELS = 4
# gather_qmm reaches this share of a plain read on an M3 Ultra: mlx issue 4509.
GATHER = 387 / 514
# One threadgroup reads so fast: a logsumexp of 262,144 logits in 40 µs.
GROUP_GB_S = 13
BARRIER_US = 1
# Select and sample, of one threadgroup each, have so many.
BARRIERS = 8
# A model that gains less stays dense.
PAYS = 1.03
# It is a tile of MLX's matrix kernels.
STATES = 32
# It is the longest wait for text.
WAIT_US = 300e3
# They are the product, its bounds, and two that judge (test_verification_costs.py).
VERIFY_LAUNCHES = 4
# One launch of a join takes so many states.
JOINED = 7
# This share of the steps is wasted, after a rejection.
WASTED = {"greedy": 0.01, "sampled": 0.03}
# One more dense row decides this share of the tokens: ten times as many as are rejected.
DOUBTS = 0.01
# mlx-lm's top-p takes so long for each token of the V.
SORT_US = {"least": 1000 / 248_000, "most": 1300 / 248_000}
# mlx-lm's loop takes so long for a kernel.
HOST_US = {"m1": 4.9, "m2": 4.3, "m3": 3.7, "m4": 3.0, "m5": 2.7}
# If the host takes more than this share of a step, the step waits for it.
HOST_BOUND = 0.9
# FlashHead's loop takes so many microseconds more on an M1.
HOST_MORE = {"greedy": 180, "sampled": 450}
# A product has one of these numbers of states.
SIZES = (1, 2, 4, 8, 16, 32)
# A product of so many states reads the rows so often: mlx 3852.
WIDE_READS = {1: 1, 2: 1.01, 4: 1.47, 8: 3.03}


class Model(NamedTuple):
    """Sizes of a model.

    ``cache_values`` are the keys and values of a token in all layers, ``full_values`` in those that
    keep all tokens. A window has so many slots in so many layers, a linear attention a state.

    Attributes:
        body: The weights that a token reads, its experts among them.
        experts: Those of them that are weights of routed experts.
        expert_bits: The bits of these where they have a format of their own, else 0.
        window_values: Keys and values of a token in a layer with a window.
        state_values: The state of a layer, in float32.
    """

    name: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    kernels: int
    body: int
    experts: int
    expert_bits: float
    softcap: bool
    cache_values: int
    n_probes: int
    full_values: int
    window: int
    window_layers: int
    window_values: int
    state_layers: int
    state_values: int

    @property
    def head(self) -> int:
        """The number of weights of the output projection."""
        return self.vocab_size * self.hidden_size

    def body_bytes(self, per_weight: float) -> float:
        """What a token reads of the body, as if it were one plain read."""
        per_expert_weight = per_weight
        if self.expert_bits:
            per_expert_weight = BYTES[self.expert_bits]
        return (self.body - self.experts) * per_weight + self.experts * per_expert_weight / GATHER

    def window_bytes(self, context: int) -> float:
        """The keys and values in all windows after so many tokens."""
        return 2 * self.window_layers * self.window_values * min(self.window, context)

    def cache_bytes(self, context: int) -> float:
        """The keys and values that a token's attention reads after so many tokens."""
        return 2 * self.full_values * context + self.window_bytes(context)

    @property
    def dense_kernels(self) -> int:
        """The number of kernels of a step that only dense decoding needs."""
        return DENSE_KERNELS + self.softcap

    @property
    def logit_bytes(self) -> int:
        """The bytes written and read outside of the passes of one threadgroup.

        They are the product's logits, those after a softcap, the log-probabilities.
        """
        return 2 * self.vocab_size * (3 + 2 * self.softcap)


class Chip(NamedTuple):
    """A chip in its largest configuration: Apple's bandwidth, TFLOPS from cores and clock."""

    name: str
    peak_gb_s: float
    peak_tflops: float

    @property
    def old(self) -> bool:
        """Whether it is an M1 or M2, with slower launches."""
        return self.name[:2] in ("m1", "m2")

    @property
    def ultra(self) -> bool:
        """Whether it is two chips in one, an Ultra."""
        return self.name.endswith("ultra")

    @property
    def matrix_states(self) -> int:
        """From so many states on MLX takes its matrix kernels.

        Below there is a read for each state. M3 and later have a kernel for 8.
        """
        if not self.old:
            return 13
        if self.ultra:
            return 12
        return 6

    @property
    def gb_s(self) -> float:
        """The bandwidth that a step gets, in GB/s."""
        share = "bandwidth"
        if self.ultra:
            share = "ultra"
        return self.peak_gb_s * constants()[share]

    @property
    def launch_us(self) -> float:
        """The time that each kernel adds, in microseconds."""
        if self.old:
            return constants()["old launch"]
        return constants()["launch"]

    @property
    def host_us(self) -> float:
        """The time of mlx-lm's loop in Python for each kernel, in microseconds."""
        return HOST_US[self.name[:2]]

    @property
    def instructions_us(self) -> float:
        """The float32 instructions of all cores in a microsecond, at the peak: two flops each."""
        return self.peak_tflops * 1e6 / 2

    @property
    def tflops(self) -> float:
        """Reached by a product of 32 bfloat16 states: mlx issue 4216; matrix units, mlx 4171."""
        shares = {"m1": 0.43, "m2": 0.55, "m5": 1.31}
        return self.peak_tflops * shares.get(self.name[:2], 0.76)

    def us(self, n_bytes: float) -> float:
        """Microseconds of a read."""
        return n_bytes / self.gb_s / 1e3


def rows(name: str) -> list[dict]:
    """The rows of a table, with numbers as such."""

    def value(text: str) -> float | str:
        if re.fullmatch(r"[\d.]+", text):
            return float(text)
        return text

    with (DATA / f"{name}.csv").open(encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


@cache
def chips() -> dict[str, Chip]:
    """The chips of chips.csv."""
    return {row["name"]: Chip(**row) for row in rows("chips")}


@cache
def models() -> dict[str, Model]:
    """The models of models.csv, whose sizes are those of their config.json."""
    found = {}
    for row in rows("models"):
        layers = row["n_layers"]
        width = row["hidden_size"]
        keys = row["kv_heads"] * row["head_size"]
        layer = 2 * width * (row["heads"] * row["head_size"] + keys)
        layer += 3 * width * row["intermediate_size"]
        clusters = row["vocab_size"] / 16
        found[row["shape"]] = Model(
            name=row["name"],
            vocab_size=row["vocab_size"],
            hidden_size=width,
            n_layers=layers,
            kernels=row["dispatches"],
            body=row["body_weights"] or layers * layer,
            experts=row["expert_weights"],
            expert_bits=row["expert_bits"],
            softcap=row["softcap"] == "True",
            cache_values=2 * layers * keys,
            n_probes=row["n_probes"] or min(max(512, clusters / 16), clusters),
            full_values=row["full_values"],
            window=row["window"],
            window_layers=row["window_layers"],
            window_values=row["window_values"],
            state_layers=row["state_layers"],
            state_values=row["state_values"],
        )
    return found


def groups_us(model: Model) -> float:
    """Microseconds that one threadgroup of mlx-lm's loop takes for its passes over all logits."""
    return DENSE_GROUPS * 2 * model.vocab_size / GROUP_GB_S / 1e3


def parts(speed: dict) -> tuple[list[float], float]:
    """Returns the parts of a public speed's step: the constants' factors, and the rest.

    They are relative to the whole.
    """
    model = models()[speed["model"]]
    chip = chips()[speed["chip"]]
    per_weight = BYTES[speed["bits"]]
    if speed["group_size"]:
        per_weight += 4 / speed["group_size"] - 1 / 16
    read = model.body_bytes(per_weight) + model.head * per_weight + model.logit_bytes
    us = (read + 2 * model.cache_values * speed["context"]) / chip.peak_gb_s / 1e3
    kernels = model.kernels + model.dense_kernels
    # Each speed has one of the two bandwidths, and one of the two launches.
    factors = [us, 0, kernels, 0]
    if chip.ultra:
        factors[:2] = [0, us]
    if chip.old:
        factors[2:] = [0, kernels]
    share = speed["tokens_per_second"] / 1e6
    return [share * factor for factor in factors], share * groups_us(model)


def waits_for_host(speed: dict) -> bool:
    """Whether the host needs all of a public speed's step."""
    model = models()[speed["model"]]
    chip = chips()[speed["chip"]]
    return host_us(model, chip) > HOST_BOUND * 1e6 / speed["tokens_per_second"]


def fitted_speeds() -> list[dict]:
    """Returns the measured speeds to which the constants are fitted."""
    return [speed for speed in rows("speeds") if not waits_for_host(speed)]


def fit(speeds: list[dict]) -> np.ndarray:
    """The factors (4,) of `parts` with the least squares of relative errors."""
    factors, rest = zip(*map(parts, speeds), strict=True)
    return np.linalg.lstsq(np.array(factors), 1 - np.array(rest), rcond=None)[0]


@cache
def constants() -> dict[str, float]:
    """The fitted constants: shares of Apple's bandwidth, microseconds of a kernel."""
    fitted = fit(fitted_speeds())
    return {
        "bandwidth": 1 / fitted[0],
        "ultra": 1 / fitted[1],
        "launch": fitted[2],
        "old launch": fitted[3],
    }


def left_out(key: str) -> np.ndarray:
    """The relative error of each public speed when those with the same ``key`` are left out."""
    speeds = fitted_speeds()
    errors = []
    for speed in speeds:
        factors, rest = parts(speed)
        others = [other for other in speeds if other[key] != speed[key]]
        errors.append(float(np.dot(factors, fit(others))) + rest - 1)
    return np.array(errors)


def host_us(model: Model, chip: Chip, text: str = "greedy", flash_head: bool = False) -> float:
    """What Python and MLX's graph take before the device has its work."""
    us = (model.kernels + model.dense_kernels) * chip.host_us
    return us + flash_head * HOST_MORE[text] * chip.host_us / HOST_US["m1"]


def body_us(model: Model, chip: Chip, bits: int, context: int = 0) -> float:
    """The device's time before the head, after so many tokens."""
    read = model.body_bytes(BYTES[bits]) + model.cache_bytes(context)
    return chip.us(read) + model.kernels * chip.launch_us


def row_us(model: Model, chip: Chip, head: int) -> float:
    """The device's time of a dense head and its choice."""
    read = model.head * BYTES[head] + model.logit_bytes
    return chip.us(read) + model.dense_kernels * chip.launch_us + groups_us(model)


def dense_us(
    model: Model, chip: Chip, body: int, head: int, sort_us: float = 0, context: int = 0
) -> float:
    """A step of mlx-lm's loop with so many bits in body and head, greedy without a sort."""
    device = body_us(model, chip, body, context) + row_us(model, chip, head) + sort_us
    return max(device, host_us(model, chip))


def flash_us(
    model: Model, chip: Chip, body: int, head: int, text: str = "greedy", context: int = 0
) -> float:
    """A step with FlashHead, its part of a verification, of the wasted steps and of the doubts."""
    clusters = model.vocab_size / 16
    centroids = clusters * (model.hidden_size * BYTES[4] + 4)
    probed = 16 * model.n_probes * model.hidden_size * BYTES[head]
    us = body_us(model, chip, body, context) + chip.us(centroids + probed / GATHER)
    us += FLASH_HEAD_KERNELS * chip.launch_us
    us += 4 * (clusters + model.n_probes) / GROUP_GB_S / 1e3 + BARRIERS * BARRIER_US
    most = max(1, min(STATES, int(WAIT_US / us)))
    us += min(verify_us(model, chip, head, k, text) / k for k in range(1, most + 1))
    us += DOUBTS * row_us(model, chip, head)
    return max(us, host_us(model, chip, text, flash_head=True)) * (1 + WASTED[text])


def verify_us(model: Model, chip: Chip, head: int, k: int, text: str) -> float:
    """The verification of k states, filled up to the next size of head/rounded_product.py."""
    size = next(size for size in SIZES if size >= k)
    read = chip.us(model.head * BYTES[head])
    matrix = 2 * STATES * model.head / chip.tflops / 1e6
    product = max(read, matrix)
    if size < chip.matrix_states and head < 16:
        product = read * size
        if not chip.old:
            product = read * WIDE_READS[size]
    passes = 4
    if text == "greedy":
        passes = 2
    passed_bytes = passes * 2 * size * model.vocab_size
    launches = VERIFY_LAUNCHES + -(-k // JOINED)
    return product + chip.us(passed_bytes) + launches * chip.launch_us


def body_bits(model: str, head: int) -> int:
    """4, or those of the file: gpt-oss beside a head of 8 bits has 8 in all but its experts."""
    if models()[model].expert_bits and head == 8:
        return 8
    return 4


def gain(model: str, chip: str, head: int) -> float:
    """How many times as fast as dense, greedy, with a 4-bit body and a head of so many bits."""
    of = models()[model], chips()[chip]
    body = body_bits(model, head)
    return dense_us(*of, body, head) / flash_us(*of, body, head)


def sampled_gains(model: str, chip: str) -> tuple[float, float]:
    """The same for 4-bit heads with top-p, by the least and the most that mlx-lm's sort takes."""
    of = models()[model], chips()[chip]
    flash = flash_us(*of, 4, 4, "sampled")
    least = dense_us(*of, 4, 4, SORT_US["least"] * of[0].vocab_size)
    most = dense_us(*of, 4, 4, SORT_US["most"] * of[0].vocab_size)
    return least / flash, most / flash


def ceiling(model: str, chip: str, head: int) -> float:
    """The greedy gain of a head that takes no time."""
    of = models()[model], chips()[chip]
    body = body_bits(model, head)
    free = max(body_us(*of, body), host_us(*of))
    return dense_us(*of, body, head) / free
