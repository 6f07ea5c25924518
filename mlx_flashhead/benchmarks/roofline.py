"""An estimate of a decode step's time on an Apple GPU, from bytes and dependent kernels.

It assumes one sequence, greedy decoding, a short context (no bytes of the cache), a model that fits
into memory, and an idle machine. Public speeds of dense models show its error.

Reductions over all tokens run in one threadgroup, but the public speeds do not tell their time
apart from that of the other kernels: a term of its own made the fit no better. The dense step's are
counted as kernels, and no more, which favours it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .apple_gpu import (
    BARRIER_US,
    GATHER_SHARE,
    GROUP_GB_S,
    Chip,
    PublicSpeed,
    find_chip,
    public_speeds,
)
from .shapes import SHAPES, ModelShape, bytes_per_weight

FORMULA = """\
dense     = (rows + logits) / bandwidth + {dense} launches
FlashHead = (centroids + probed / g) / bandwidth + {ours} launches + select + check
select    = {group_bytes:,} bytes / threadgroup + {barriers} barriers
check     = {wasted:g} steps + 1/{states} of
            max(2 · {states} · V · D / arithmetic, rows / bandwidth)
            + {passes} · {states} · logits / bandwidth + {check} launches
model     = body / bandwidth + head + ({layers} layers · {layer_kernels} + {others}) launches
probed    = {probes} clusters of {size} rows, of {clusters} clusters{assumed}"""
OTHER_KERNELS = 2  # embedding, last norm
DENSE_KERNELS = 4  # rows, logsumexp, subtraction, argmax
FLASH_HEAD_KERNELS = 4  # route, select, score, sample: metal/README.md
TIED_KERNELS = 1  # the embedding asks slot_of for its row
BARRIERS = 8  # of select and sample, one threadgroup each
LOGIT_BYTES = 2
STATES = 32  # of a check, whose product has tiles of 32 rows
CHECK_KERNELS = 20  # after its product, lossless/screen.py
CHECK_PASSES = 5  # over its logits: written, copied, read three times
WASTED = 0.02  # of the steps are thrown away, at half a per cent of differences


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


def formula(shape: ModelShape) -> str:
    """The formula of `estimates` with the model's numbers."""
    return FORMULA.format(
        dense=DENSE_KERNELS,
        ours=_flash_head_kernels(shape),
        group_bytes=_group_bytes(shape),
        barriers=BARRIERS,
        states=STATES,
        passes=CHECK_PASSES,
        check=CHECK_KERNELS,
        wasted=WASTED,
        layers=shape.n_layers,
        layer_kernels=shape.layer_kernels,
        others=OTHER_KERNELS,
        probes=shape.n_probes,
        size=shape.cluster_size,
        clusters=shape.n_clusters,
        assumed="" if shape.measured_probes else " (assumed)",
    )


def estimates(shape: ModelShape, chip: str) -> Iterator[Estimate]:
    """The model as stored, if it is, then in 16 bits, 4 bits, and 4 bits with a finer head."""
    if shape.body_bytes is not None and shape.head_bytes is not None:
        precision = ("as stored", shape.stored)
        yield from both(shape, find_chip(chip), precision, shape.body_bytes, shape.head_bytes)
    for body_bits, head_bits in ((16, 16), (4, 16), (4, 8), (4, 4)):
        yield from of_bits(shape, chip, body_bits, head_bits)


def of_bits(shape: ModelShape, chip: str, body_bits: int, head_bits: int) -> Iterator[Estimate]:
    """Dense and FlashHead, with so many bits in the body and in the head."""
    body = shape.body_weights * bytes_per_weight(body_bits)
    rows = shape.vocab_size * shape.hidden_size * bytes_per_weight(head_bits)
    precision = (f"{body_bits}-bit", f"{head_bits}-bit")
    yield from both(shape, find_chip(chip), precision, body, rows)


def both(
    shape: ModelShape, chip: Chip, precision: tuple[str, str], body_bytes: float, head_bytes: float
) -> Iterator[Estimate]:
    """Dense and FlashHead of a body and rows of so many bytes."""

    def us(read: float) -> float:
        return read / chip.gb_s / 1e3

    kernels = shape.n_layers * shape.layer_kernels + OTHER_KERNELS
    body = us(body_bytes) + kernels * chip.launch_us
    logits = LOGIT_BYTES * shape.vocab_size
    head = us(head_bytes + logits) + DENSE_KERNELS * chip.launch_us
    yield Estimate(
        "dense", *precision, (head_bytes + logits) / 1e6, head / 1e3, (body + head) / 1e3
    )

    probed = head_bytes / shape.vocab_size * shape.n_probes * shape.cluster_size
    head = us(shape.centroid_bytes + probed / GATHER_SHARE)
    head += _flash_head_kernels(shape) * chip.launch_us
    head += _group_bytes(shape) / GROUP_GB_S / 1e3 + BARRIERS * BARRIER_US
    product = 2 * STATES * shape.vocab_size * shape.hidden_size / chip.tflops / 1e6
    check = max(product, us(head_bytes)) + us(CHECK_PASSES * STATES * logits)
    head += (check + CHECK_KERNELS * chip.launch_us) / STATES
    head += WASTED * (body + head)
    read = shape.centroid_bytes + probed + head_bytes / STATES + CHECK_PASSES * logits
    yield Estimate("FlashHead", *precision, read / 1e6, head / 1e3, (body + head) / 1e3)


def dense_step(speed: PublicSpeed) -> tuple[float, int]:
    """Bytes read and dependent kernels of a step of a public speed's model."""
    shape = SHAPES[speed.model]
    weights = shape.body_weights + shape.vocab_size * shape.hidden_size
    read = weights * bytes_per_weight(speed.bits, speed.group_size)
    read += 2 * shape.cache_values * speed.context + LOGIT_BYTES * shape.vocab_size
    return read, shape.n_layers * shape.layer_kernels + OTHER_KERNELS + DENSE_KERNELS


def public_errors() -> Iterator[tuple[PublicSpeed, float, float]]:
    """Each public speed, its estimated milliseconds, and the estimate's relative error."""
    for speed in public_speeds():
        read, kernels = dense_step(speed)
        ms = read / speed.chip.gb_s / 1e6 + kernels * speed.chip.launch_us / 1e3
        yield speed, ms, ms * speed.tokens_per_second / 1000 - 1


def _flash_head_kernels(shape: ModelShape) -> int:
    return FLASH_HEAD_KERNELS + (TIED_KERNELS if shape.tied else 0)


def _group_bytes(shape: ModelShape) -> int:
    """Scores of all clusters, and the best logits of the probed ones."""
    return 4 * (shape.n_clusters + shape.n_probes)
