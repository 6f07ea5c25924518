"""Estimates of a decode step's time on Apple chips: docs/speed.md, docs/finer-head.md, README.md.

    python scripts/figures/apple_estimates.py            # prints the tables and the fit's errors
    python scripts/figures/apple_estimates.py --write    # puts them into the pages

One sequence, a short context (no bytes of the cache), a model that fits into memory, an idle
machine. Nothing is measured here: times are counted from bytes and dependent kernels.

    dense     = (body + rows + logits) / bandwidth + kernels · launch + logsumexp
    FlashHead = (body + centroids + probed rows / g) / bandwidth + kernels · launch + select
                + verification + wasted steps
    verification of k states, a k-th part of it for each token:
                product + (write + read of k rows of logits) / bandwidth + 4 launches
    product   = of 1, 2, 4, 8, 16 or 32 states: as many reads of the rows, or fewer, up to the
                limit of MLX's vector kernels, else
                max(rows / bandwidth, 2 · 32 · V · D / arithmetic)

The public speeds of dense models in apple_estimates/speeds.csv fit four constants by least squares
of relative errors: the share of Apple's bandwidth that is reached, on an Ultra too, and the time of
a dependent kernel, on M1 and M2 too.

Bodies: a layer of an ordinary decoder has 10 dependent kernels and its norms. Qwen3.5 has three
gated delta layers (16 heads of 128; the 4B 32 value heads) for each attention layer, whose queries
have a gate. Gemma 4's layers read two matrices of 256 columns each for the per-layer inputs; of the
embedding of these one row is read, which is not counted. The kernels of these and of LFM2.5 are
counted in mlx-lm's source.
"""

import csv
import re
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np

from mlx_flashhead.common.arguments import Parser
from mlx_flashhead.common.command import command

CHECKOUT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_suffix("")
CHIPS = ("m1", "m2", "m4", "m5", "m4-pro", "m4-max", "m3-ultra")
MODELS = (
    *("gemma-3-270m", "gemma-3-1b", "gemma-4-e2b", "gemma-4-e4b", "qwen3-0.6b", "qwen3.5-0.8b"),
    *("qwen3.5-2b", "qwen3.5-4b", "llama-3.2-1b", "lfm2.5-1.2b", "smollm2"),
)
LARGE = "llama-3.1-8b"  # in one line
PAYS = 1.03  # below, a model stays dense
BYTES = {4: 0.5625, 5: 0.6875, 6: 0.8125, 8: 1.0625, 16: 2.0}  # per weight, in groups of 64
LAYER_KERNELS, OTHER_KERNELS, DENSE_KERNELS = 10, 2, 3
FLASH_HEAD_KERNELS = 5  # route, select, score, sample; the row of the next token's embedding
GATHER = 387 / 514  # of a plain read, gather_qmm on an M3 Ultra: mlx issue 4509
GROUP_GB_S = 13  # of one threadgroup: a logsumexp of 262,144 logits in 40 µs
BARRIER_US, BARRIERS = 1, 8  # of select and sample, one threadgroup each
STATES, WAIT_US = 32, 300e3  # a tile of MLX's matrix kernels; the longest wait for text
VERIFY_LAUNCHES = 4  # the product and its screening
WASTED = {"greedy": 0.01, "sampled": 0.03}  # of the steps, after a rejection
SORT_US = 3300 / 248_000  # per token of the vocabulary, mlx-lm's top-p: Rapid-MLX pull request 542
SIZES = (1, 2, 4, 8, 16, 32)  # of a product
WIDE_READS = {1: 1, 2: 1.01, 4: 1.47, 8: 3.03}  # of the rows by so many states: mlx 3852


class Model(NamedTuple):
    """Sizes of a model; ``cache_values`` are the keys and values of a token in all layers."""

    name: str
    vocab_size: int
    hidden_size: int
    kernels: int
    body: int
    cache_values: int
    n_probes: int

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden_size


class Chip(NamedTuple):
    """A chip in its largest configuration: Apple's bandwidth, TFLOPS from cores and clock."""

    name: str
    peak_gb_s: float
    peak_tflops: float

    @property
    def old(self) -> bool:
        return self.name[:2] in ("m1", "m2")

    @property
    def ultra(self) -> bool:
        return self.name.endswith("ultra")

    @property
    def gb_s(self) -> float:
        return self.peak_gb_s * constants()["ultra" if self.ultra else "bandwidth"]

    @property
    def launch_us(self) -> float:
        return constants()["old launch" if self.old else "launch"]

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
        return float(text) if re.fullmatch(r"[\d.]+", text) else text

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
        layers, width = row["n_layers"], row["hidden_size"]
        keys = row["kv_heads"] * row["head_size"]
        layer = 2 * width * (row["heads"] * row["head_size"] + keys)
        layer += 3 * width * row["intermediate_size"]
        kernels = row["layer_kernels"] or LAYER_KERNELS + row["norms"]
        clusters = row["vocab_size"] / 16
        found[row["shape"]] = Model(
            name=row["name"],
            vocab_size=row["vocab_size"],
            hidden_size=width,
            kernels=layers * kernels + OTHER_KERNELS,
            body=row["body_weights"] or layers * layer,
            cache_values=2 * layers * keys,
            n_probes=row["n_probes"] or min(max(512, clusters / 16), clusters),
        )
    return found


def logsumexp_us(model: Model) -> float:
    """Of mlx-lm's loop: all logits in one threadgroup."""
    return 2 * model.vocab_size / GROUP_GB_S / 1e3


def parts(speed: dict) -> tuple[list[float], float]:
    """Of a public speed's step: the constants' factors, and the rest; relative to the whole."""
    model, chip = models()[speed["model"]], chips()[speed["chip"]]
    per_weight = BYTES[speed["bits"]]
    if speed["group_size"]:
        per_weight += 4 / speed["group_size"] - 1 / 16
    read = (model.body + model.head) * per_weight + 2 * model.vocab_size
    us = (read + 2 * model.cache_values * speed["context"]) / chip.peak_gb_s / 1e3
    kernels = model.kernels + DENSE_KERNELS
    factors = us * (not chip.ultra), us * chip.ultra, kernels * (not chip.old), kernels * chip.old
    share = speed["tokens_per_second"] / 1e6
    return [share * factor for factor in factors], share * logsumexp_us(model)


def fit(speeds: list[dict]) -> np.ndarray:
    """The factors (4,) of `parts` with the least squares of relative errors."""
    factors, rest = zip(*map(parts, speeds), strict=True)
    return np.linalg.lstsq(np.array(factors), 1 - np.array(rest), rcond=None)[0]


@cache
def constants() -> dict[str, float]:
    """The fitted constants: shares of Apple's bandwidth, microseconds of a kernel."""
    us, ultra_us, launch, old_launch = fit(rows("speeds"))
    return {"bandwidth": 1 / us, "ultra": 1 / ultra_us, "launch": launch, "old launch": old_launch}


def left_out(key: str) -> np.ndarray:
    """The relative error of each public speed when those with the same ``key`` are left out."""
    speeds, errors = rows("speeds"), []
    for speed in speeds:
        factors, rest = parts(speed)
        others = [other for other in speeds if other[key] != speed[key]]
        errors.append(float(np.dot(factors, fit(others))) + rest - 1)
    return np.array(errors)


def dense_us(model: Model, chip: Chip, body: int, head: int, text: str = "greedy") -> float:
    """A step of mlx-lm's loop with so many bits in body and head; 0 for a head that is free."""
    us = chip.us(model.body * BYTES[body]) + model.kernels * chip.launch_us
    if not head:
        return us
    us += chip.us(model.head * BYTES[head] + 2 * model.vocab_size) + DENSE_KERNELS * chip.launch_us
    us += logsumexp_us(model)
    return us + (SORT_US * model.vocab_size if text == "sampled" else 0)


def flash_us(model: Model, chip: Chip, body: int, head: int, text: str = "greedy") -> float:
    """A step with FlashHead, its part of a verification and of the wasted steps."""
    clusters = model.vocab_size / 16
    centroids = clusters * (model.hidden_size * BYTES[4] + 4)
    probed = 16 * model.n_probes * model.hidden_size * BYTES[head]
    us = dense_us(model, chip, body, 0) + chip.us(centroids + probed / GATHER)
    us += FLASH_HEAD_KERNELS * chip.launch_us
    us += 4 * (clusters + model.n_probes) / GROUP_GB_S / 1e3 + BARRIERS * BARRIER_US
    most = max(1, min(STATES, int(WAIT_US / us)))
    verification = min(verify_us(model, chip, head, k, text) / k for k in range(1, most + 1))
    return (us + verification) * (1 + WASTED[text])


def verify_us(model: Model, chip: Chip, head: int, k: int, text: str) -> float:
    """The verification of k states, filled up to the next size of decoding/rounding.py."""
    size = next(size for size in SIZES if size >= k)
    read = chip.us(model.head * BYTES[head])
    matrix = 2 * STATES * model.head / chip.tflops / 1e6
    vectors = (12 if chip.ultra else 6) if chip.old else 13
    product = max(read, matrix)
    if size < vectors and head < 16:  # a read for each state; M3 and later have a kernel for 8
        product = read * (size if chip.old else WIDE_READS[size])
    passes = (2 if text == "greedy" else 4) * 2 * size * model.vocab_size
    return product + chip.us(passes) + VERIFY_LAUNCHES * chip.launch_us


def gain(model: str, chip: str, head: int, text: str = "greedy", dense: int = 0) -> float:
    """How many times as fast as dense, with a 4-bit body and a dense head of as many bits.

    ``dense`` is another number of bits of the dense head.
    """
    of = models()[model], chips()[chip]
    return dense_us(*of, 4, dense or head, text) / flash_us(*of, 4, head, text)


def ceiling(model: str, chip: str, head: int) -> float:
    """The same with a head that takes no time."""
    of = models()[model], chips()[chip]
    return dense_us(*of, 4, head) / dense_us(*of, 4, 0)


def shown(value: float) -> str:
    """The cell of a gain."""
    return f"{value:.2f}" if value >= PAYS else "dense"


def table(*columns: str) -> list[str]:
    """The head of a table with a column for each chip."""
    names = [*columns, *(chip.replace("-", " ").title() for chip in CHIPS)]
    return [line(*names), line(*("---" for _ in names))]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def speed_page() -> list[str]:
    """All models: greedy with three heads, in brackets with a free one, and sampled."""

    def cells(model: str, head: int) -> list[str]:
        gains = [(gain(model, chip, head), ceiling(model, chip, head)) for chip in CHIPS]
        return [f"{shown(faster)} ({free:.2f})" for faster, free in gains]

    lines = table("model", "body, head")
    for model in MODELS:
        lines.append(line(models()[model].name, "4, 4", *cells(model, 4)))
        lines += [line("", f"4, {head}", *cells(model, head)) for head in (8, 16)]
        sampled = (shown(gain(model, chip, 4, "sampled")) for chip in CHIPS)
        lines.append(line("", "4, 4, top-p", *sampled))
    return [*lines, line(models()[LARGE].name, "4, 8", *cells(LARGE, 8))]


def fit_text() -> list[str]:
    """The constants, and the errors of speeds that are left out."""
    c, speeds, by_chip = constants(), left_out("tokens_per_second"), left_out("chip")
    sizes = np.abs(speeds)
    text = (
        f"Fitted to {len(speeds)} public speeds on {len({s['chip'] for s in rows('speeds')})} "
        f"chips: {c['bandwidth']:.2f} of Apple's bandwidth, {c['ultra']:.2f} on an Ultra, "
        f"{c['launch']:.1f} µs a kernel, {c['old launch']:.1f} µs on M1 and M2. A "
        f"speed that is left out is missed by {np.median(sizes):.0%} in the median, nine of ten by "
        f"less than {np.quantile(sizes, 0.9):.0%}, all by {speeds.min():+.0%} to "
        f"{speeds.max():+.0%}; a whole chip by {np.median(np.abs(by_chip)):.0%}."
    )
    return wrap(text.replace("%", " %"), 120)


def readme() -> list[str]:
    """4-bit models as most people have them: greedy, without a finer head."""
    lines = table("4-bit model")
    for model in (*MODELS, LARGE):
        lines.append(line(models()[model].name, *(shown(gain(model, c, 4)) for c in CHIPS)))
    return lines


def finer_head() -> list[str]:
    """FlashHead with a finer head, as a multiple of the dense model whose head has 4 bits."""
    lines = table("model", "head, bits")
    for model in MODELS:
        for head in (8, 16):
            cells = (f"{gain(model, chip, head, dense=4):.2f}" for chip in CHIPS)
            lines.append(line("" if head == 16 else models()[model].name, str(head), *cells))
    return lines


BLOCKS = {  # page and marker: lines
    ("docs/speed.md", "estimates"): speed_page,
    ("docs/speed.md", "fit"): fit_text,
    ("docs/finer-head.md", "estimates"): finer_head,
    ("README.md", "estimates"): readme,
}


def with_block(page: str, name: str, lines: list[str]) -> str:
    """The page with other lines between the comments of a block, if it has them."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    block = begin + "".join(f"{one}\n" for one in lines) + end
    return re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: block, page)


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/apple_estimates.py", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="Put the tables into the pages.")
    write = parser.parse_args().write
    for (page, name), lines in BLOCKS.items():
        path = CHECKOUT / page
        if not write:
            print(f"{page}, {name}:", *lines(), "", sep="\n")
        elif path.exists():
            text = path.read_text(encoding="utf-8")
            path.write_text(with_block(text, name, lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
