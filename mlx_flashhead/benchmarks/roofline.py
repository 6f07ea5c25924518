"""An estimate of a decode step's time on an Apple GPU, from bytes and dependent kernels.

It assumes one sequence, greedy decoding, a short context (no bytes of the cache), a model that fits
into memory, and an idle machine. This project has measured none of the constants. Public speeds of
dense models on Macs show the estimate's error.

Reductions over all tokens run in one threadgroup, but the public speeds do not tell their time
apart from that of the other kernels: a term of its own made the fit no better. The dense step's are
counted as kernels, and no more, which favours it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from . import data
from .shapes import SHAPES, ModelShape, bytes_per_weight

# The first four are fitted to data/speeds.csv: scripts/figures/fit_macs.py prints their errors.
BANDWIDTH_SHARE = 0.882
ULTRA_SHARE = 0.735
LAUNCH_US = 3.32
OLD_LAUNCH_US = 7.41
GATHER_SHARE = 387 / 514
MATRIX_SHARE = 0.78
GROUP_GB_S = 12
BARRIER_US = 1
CONSTANTS = {  # name: value, source
    "bandwidth": (BANDWIDTH_SHARE, "of Apple's figure: fitted to public speeds"),
    "of an Ultra": (ULTRA_SHARE, "the same"),
    "launch": (LAUNCH_US, "µs per dependent kernel: fitted to public speeds"),
    "on M1, M2": (OLD_LAUNCH_US, "the same"),
    "g": (GATHER_SHARE, "of a plain read, gather_qmm: M3 Ultra, mlx issue 4509"),
    "arithmetic": (MATRIX_SHARE, "of the peak, 32 states: an estimate"),
    "threadgroup": (GROUP_GB_S, "GB/s of one, a core's part of an M4 Max: an estimate"),
    "barrier": (BARRIER_US, "µs: an estimate"),
}
OTHER_KERNELS = 2  # embedding, last norm
DENSE_KERNELS = 4  # rows, logsumexp, subtraction, argmax
# route, select, score, sample: metal/README.md; a tied embedding asks slot_of for its row
FLASH_HEAD_KERNELS = {False: 4, True: 5}
BARRIERS = 8  # of select and sample, one threadgroup each
LOGIT_BYTES = 2
STATES = 32  # of a check, whose product has tiles of 32 rows
CHECK_KERNELS = 20  # after its product, lossless/screen.py
CHECK_PASSES = 5  # over its logits: written, copied, read three times
WASTED = 0.02  # of the steps are thrown away, at half a per cent of differences
FORMULA = f"""\
dense     = (rows + logits) / bandwidth + {DENSE_KERNELS} launches
FlashHead = (centroids + probed / g) / bandwidth + {{kernels}} launches + select + check
select    = {{group_bytes:,}} bytes / threadgroup + {BARRIERS} barriers
check     = {WASTED:g} steps + 1/{STATES} of
            max(2 · {STATES} · V · D / arithmetic, rows / bandwidth)
            + {CHECK_PASSES} · {STATES} · logits / bandwidth + {CHECK_KERNELS} launches
model     = body / bandwidth + head \
+ ({{n_layers}} layers · {{layer_kernels}} + {OTHER_KERNELS}) launches
probed    = {{n_probes}} clusters of {{cluster_size}} rows, of {{n_clusters}} clusters{{assumed}}"""


class Chip:
    """A chip in its largest configuration: its peaks, and what is reached of them.

    ``gb_s`` is what a product with a vector reads, ``launch_us`` the time of a dependent kernel.
    """

    def __init__(self, name: str, peak_gb_s: float, peak_tflops: float):
        self.name, self.peak_gb_s, self.peak_tflops = name, peak_gb_s, peak_tflops
        self.ultra = name.endswith("ultra")  # two chips in one
        self.old = name[:2] in ("m1", "m2")
        self.gb_s = peak_gb_s * (ULTRA_SHARE if self.ultra else BANDWIDTH_SHARE)
        self.launch_us = OLD_LAUNCH_US if self.old else LAUNCH_US


@dataclass(frozen=True)
class Estimate:
    """The estimated time of one form of a model, "dense" or "FlashHead".

    ``body`` and ``rows`` are precisions. The head reads ``head_mb`` of weights and logits.
    """

    form: str
    body: str
    rows: str
    head_mb: float
    head_ms: float
    model_ms: float


CHIPS = {row["name"]: Chip(**row) for row in data.read("chips")}
SPEEDS = data.read("speeds")


def find_chip(name: str) -> Chip:
    """The chip of a name such as "m4-pro" or "M4 Pro".

    Raises:
        ValueError: If the chip is unknown.
    """
    name = name.strip().lower().replace(" ", "-")
    if name not in CHIPS:
        raise ValueError(f"Unknown chip {name!r}: choose one of {', '.join(CHIPS)}.")
    return CHIPS[name]


def formula(shape: ModelShape) -> str:
    """The formula of `estimates` with the model's numbers."""
    return FORMULA.format(
        **asdict(shape),
        kernels=FLASH_HEAD_KERNELS[shape.tied],
        group_bytes=_group_bytes(shape),
        assumed="" if shape.measured_probes else " (assumed)",
    )


def estimates(shape: ModelShape, chip: Chip) -> Iterator[Estimate]:
    """The model as stored, if it is, then in 16 bits, 4 bits, and 4 bits with a finer head."""
    if shape.body_bytes is not None and shape.head_bytes is not None:
        precision = ("as stored", shape.stored)
        yield from _both(shape, chip, precision, shape.body_bytes, shape.head_bytes)
    for body_bits, head_bits in ((16, 16), (4, 16), (4, 8), (4, 4)):
        yield from of_bits(shape, chip, body_bits, head_bits)


def of_bits(shape: ModelShape, chip: Chip, body_bits: int, head_bits: int) -> Iterator[Estimate]:
    """Dense and FlashHead, with so many bits in the body and in the head."""
    body = shape.body_weights * bytes_per_weight(body_bits)
    rows = shape.vocab_size * shape.hidden_size * bytes_per_weight(head_bits)
    yield from _both(shape, chip, (f"{body_bits}-bit", f"{head_bits}-bit"), body, rows)


def _both(
    shape: ModelShape, chip: Chip, precision: tuple[str, str], body_bytes: float, head_bytes: float
) -> Iterator[Estimate]:
    """Dense and FlashHead of a body and rows of so many bytes."""

    def us(read: float) -> float:
        return read / chip.gb_s / 1e3

    kernels = shape.n_layers * shape.layer_kernels + OTHER_KERNELS
    body = us(body_bytes) + kernels * chip.launch_us
    logits = LOGIT_BYTES * shape.vocab_size
    read = head_bytes + logits
    head = us(read) + DENSE_KERNELS * chip.launch_us
    yield Estimate("dense", *precision, read / 1e6, head / 1e3, (body + head) / 1e3)

    probed = head_bytes / shape.vocab_size * shape.n_probes * shape.cluster_size
    head = us(shape.centroid_bytes + probed / GATHER_SHARE)
    head += FLASH_HEAD_KERNELS[shape.tied] * chip.launch_us
    head += _group_bytes(shape) / GROUP_GB_S / 1e3 + BARRIERS * BARRIER_US
    operations = 2 * STATES * shape.vocab_size * shape.hidden_size
    product_us = operations / (chip.peak_tflops * MATRIX_SHARE * 1e6)
    check = max(product_us, us(head_bytes)) + us(CHECK_PASSES * STATES * logits)
    head += (check + CHECK_KERNELS * chip.launch_us) / STATES
    head += WASTED * (body + head)
    read = shape.centroid_bytes + probed + head_bytes / STATES + CHECK_PASSES * logits
    yield Estimate("FlashHead", *precision, read / 1e6, head / 1e3, (body + head) / 1e3)


def dense_step(speed: dict) -> tuple[float, int]:
    """Bytes read and dependent kernels of a step of a public speed's model."""
    shape = SHAPES[speed["model"]]
    weights = shape.body_weights + shape.vocab_size * shape.hidden_size
    read = weights * bytes_per_weight(speed["bits"], speed["group_size"])
    read += 2 * shape.cache_values * speed["context"] + LOGIT_BYTES * shape.vocab_size
    return read, shape.n_layers * shape.layer_kernels + OTHER_KERNELS + DENSE_KERNELS


def public_speeds() -> Iterator[dict]:
    """Each public speed with its estimated milliseconds and the estimate's relative error."""
    for speed in SPEEDS:
        chip, (read, kernels) = CHIPS[speed["chip"]], dense_step(speed)
        ms = read / chip.gb_s / 1e6 + kernels * chip.launch_us / 1e3
        yield speed | {"estimated_ms": ms, "error": ms * speed["tokens_per_second"] / 1000 - 1}


def _group_bytes(shape: ModelShape) -> int:
    """Scores of all clusters, and the best logits of the probed ones."""
    return 4 * (shape.n_clusters + shape.n_probes)
