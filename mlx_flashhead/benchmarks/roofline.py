"""An estimate of a decode step's time on an Apple GPU, from bytes and dependent kernels.

It assumes one sequence, greedy decoding, a short context (no bytes of the cache), a model that fits
into memory, and an idle machine. Public measurements beside it show its error.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.formats import AFFINE, AFFINE_BITS, FLOATS, USUAL_GROUP, find_format
from ..index.files import FlashHeadIndex
from ..models.locate import find_head
from .apple_gpu import (
    GATHER_SHARE,
    LAUNCH_US,
    PUBLIC_MEASUREMENTS,
    SELECT_US,
    Measurement,
    arithmetic,
    bandwidth,
)

FORMULA = """\
dense     = rows / bandwidth + {launch} µs
FlashHead = (centroids + probed rows / g) / bandwidth + {kernels} · {launch} + {select} µs + check
check     = max(2 · {states} · V · D / arithmetic, rows / bandwidth) / {states} + {wasted:g} steps
model     = body / bandwidth + head + ({layers} layers · {layer_kernels} + {others}) · {launch} µs
probed rows: {probes} clusters of {size} rows, of {clusters} clusters"""
# of floats, and of affine rows in the usual groups
BYTES_PER_WEIGHT = {16: find_format(FLOATS, 16).bytes_per_weight()} | {
    bits: find_format(AFFINE, bits).bytes_per_weight(USUAL_GROUP) for bits in AFFINE_BITS
}
# embedding, last norm, logsumexp, subtraction, argmax
OTHER_KERNELS = 5
# projections in, rotation, cache, attention, projection out, addition; gate and up, activation,
# down, addition. Independent kernels run at once. Norms are added.
LAYER_KERNELS = 10
DENSE_KERNELS = 1
FLASH_HEAD_KERNELS = 4  # route, select, score, sample: metal/README.md
STATES = 32  # of a check, whose product has tiles of 32 rows
WASTED = 0.02  # of the steps are thrown away, at half a per cent of differences
USUAL_PROBES, CLUSTER_SIZE = 256, 16


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the estimate uses.

    Attributes:
        name: Shown in tables.
        vocab_size: Rows of the head V.
        hidden_size: Their width D.
        n_layers: Number of layers.
        layer_kernels: Dependent kernels per layer.
        body_weights: Weights of the body's matrices, without embeddings.
        n_clusters: Clusters C.
        cluster_size: Tokens per cluster.
        n_probes: Clusters scored per token.
        stage_1_bytes: Bytes of centroids and their bias.
        body_bytes: Bytes of the body as stored, None without a checkpoint.
        head_bytes: Bytes of the head's rows as stored, or None.
        stored: The precision of the rows as stored, such as "4-bit", or "".
    """

    name: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    layer_kernels: int
    body_weights: int
    n_clusters: int
    cluster_size: int
    n_probes: int
    stage_1_bytes: int
    body_bytes: int | None = None
    head_bytes: int | None = None
    stored: str = ""

    def with_probes(self, n_probes: int) -> "ModelShape":
        """The same with another number of probes.

        Raises:
            ValueError: If it is not 1 … C.
        """
        if not 1 <= n_probes <= self.n_clusters:
            raise ValueError(
                f"{n_probes} clusters cannot be scored: choose 1 to {self.n_clusters}."
            )
        return replace(self, n_probes=n_probes)


@dataclass(frozen=True)
class Estimate:
    """The estimated time of one form of a model.

    Attributes:
        form: "dense" or "FlashHead".
        body: Precision of the body.
        rows: Precision of the head's rows.
        head_mb: Megabytes that the head reads and writes per token.
        head_ms: Milliseconds of the head.
        model_ms: Milliseconds of the whole step.
    """

    form: str
    body: str
    rows: str
    head_mb: float
    head_ms: float
    model_ms: float


def decoder_shape(
    name: str,
    vocab_size: int,
    hidden_size: int,
    n_layers: int,
    intermediate_size: int,
    heads: tuple[int, int, int],
    norms: int,
) -> ModelShape:
    """The shape of an ordinary decoder without a checkpoint.

    Args:
        heads: Query heads, key and value heads, width of a head.
        norms: Dependent norms per layer, that of queries and keys included.
    """
    query_heads, kv_heads, width = heads
    attention = 2 * hidden_size * width * (query_heads + kv_heads)
    return ModelShape(
        name=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        n_layers=n_layers,
        layer_kernels=LAYER_KERNELS + norms,
        body_weights=n_layers * (attention + 3 * hidden_size * intermediate_size),
        **_usual_index(vocab_size, hidden_size),
    )


def model_shape(name: str, model: nn.Module, index: FlashHeadIndex | None = None) -> ModelShape:
    """The shape of an mlx-lm model; its weights need not be loaded.

    Args:
        name: Shown in tables.
        model: Lazily loaded or not, without an installed FlashHead.
        index: Its FlashHead; default: clusters of 16, centroids of 4 bits.

    Raises:
        ValueError: If the model is a mixture of experts or has no layers, or if its head cannot be
            found.
    """
    location = find_head(model)
    rows = location.rows()
    layers = [layer for layer in getattr(model, "layers", []) if isinstance(layer, nn.Module)]
    if not layers:
        raise ValueError(f"{name} has no list of layers, so its kernels cannot be counted.")
    weights = stored = 0
    for module in model.modules():
        if module is location.module or isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            continue
        own = {k: a for k, a in module.items() if isinstance(a, mx.array) and k[0] != "_"}
        stored += sum(array.nbytes for array in own.values())
        matrix = own.get("weight")
        if matrix is None or matrix.ndim < 2:
            continue
        if matrix.ndim == 3 and "Switch" in type(module).__name__:
            raise ValueError(
                f"{name} is a mixture of experts, which reads only some of its weights per token: "
                "the estimate is for dense models."
            )
        weights += matrix.size * 32 // module.bits if "scales" in own else matrix.size
    shape = ModelShape(
        name=name,
        vocab_size=rows.n_rows,
        hidden_size=rows.hidden_size,
        n_layers=len(layers),
        layer_kernels=LAYER_KERNELS + _norms(layers[0]),
        body_weights=weights,
        body_bytes=stored,
        head_bytes=rows.nbytes,
        stored=f"{rows.format.bits}-bit",
        **_usual_index(rows.n_rows, rows.hidden_size),
    )
    if index is None:
        return shape
    return replace(
        shape,
        n_clusters=index.config.n_clusters,
        cluster_size=index.config.cluster_size,
        n_probes=index.config.checked_probes or index.config.n_probes,
        stage_1_bytes=index.centroids.routing_bytes,
    )


def formula(shape: ModelShape) -> str:
    """The formula of `estimates` with the model's numbers."""
    return FORMULA.format(
        kernels=FLASH_HEAD_KERNELS,
        select=SELECT_US,
        states=STATES,
        wasted=WASTED,
        launch=LAUNCH_US,
        layers=shape.n_layers,
        layer_kernels=shape.layer_kernels,
        others=OTHER_KERNELS,
        probes=shape.n_probes,
        size=shape.cluster_size,
        clusters=shape.n_clusters,
    )


def estimates(shape: ModelShape, chip: str) -> Iterator[Estimate]:
    """The model as stored, if it is, then in 16 bits, 4 bits, and 4 bits with a finer head."""
    if shape.body_bytes is not None and shape.head_bytes is not None:
        stored = (shape.body_bytes, shape.head_bytes)
        for form in ("dense", "FlashHead"):
            yield _estimate(shape, chip, form, ("as stored", shape.stored), *stored)
    for body_bits, head_bits in ((16, 16), (4, 16), (4, 8), (4, 4)):
        sizes = (
            shape.body_weights * BYTES_PER_WEIGHT[body_bits],
            shape.vocab_size * shape.hidden_size * BYTES_PER_WEIGHT[head_bits],
        )
        for form in ("dense", "FlashHead"):
            yield _estimate(shape, chip, form, (f"{body_bits}-bit", f"{head_bits}-bit"), *sizes)


def checked_measurements() -> Iterator[tuple[Measurement, float, float, float]]:
    """Each public measurement: itself, its ms, the estimated ms, and the estimate's error."""
    for measurement in PUBLIC_MEASUREMENTS:
        shape = SHAPES[measurement.shape]
        (dense,) = (
            e
            for e in estimates(shape, measurement.chip)
            if (e.form, e.body, e.rows) == ("dense", "4-bit", "4-bit")
        )
        measured_ms = 1000 / measurement.tokens_per_second
        yield measurement, measured_ms, dense.model_ms, dense.model_ms / measured_ms - 1


def _estimate(
    shape: ModelShape,
    chip: str,
    form: str,
    precision: tuple[str, str],
    body_bytes: float,
    head_bytes: float,
) -> Estimate:
    gb_s = bandwidth(chip)
    other_kernels = shape.n_layers * shape.layer_kernels + OTHER_KERNELS
    body_us = body_bytes / gb_s / 1e3 + other_kernels * LAUNCH_US
    if form == "dense":
        read = head_bytes + 2 * shape.vocab_size  # the logits are written
        head_us = read / gb_s / 1e3 + DENSE_KERNELS * LAUNCH_US
    else:
        probed = head_bytes / shape.vocab_size * shape.n_probes * shape.cluster_size
        head_us = (shape.stage_1_bytes + probed / GATHER_SHARE) / gb_s / 1e3
        head_us += FLASH_HEAD_KERNELS * LAUNCH_US + SELECT_US
        product = 2 * STATES * shape.vocab_size * shape.hidden_size / arithmetic(chip) / 1e6
        check_us = max(product, head_bytes / gb_s / 1e3) / STATES
        head_us += check_us + WASTED * (body_us + head_us)
        read = shape.stage_1_bytes + probed + head_bytes / STATES
    return Estimate(form, *precision, read / 1e6, head_us / 1e3, (body_us + head_us) / 1e3)


def _usual_index(vocab_size: int, hidden_size: int) -> dict[str, Any]:
    """The conversion's default: clusters of 16, centroids of 4 bits and their bias."""
    n_clusters = -(-vocab_size // CLUSTER_SIZE)
    return {
        "n_clusters": n_clusters,
        "cluster_size": CLUSTER_SIZE,
        "n_probes": min(USUAL_PROBES, n_clusters),
        "stage_1_bytes": round(n_clusters * (hidden_size * BYTES_PER_WEIGHT[4] + 4)),
    }


def _norms(layer: nn.Module) -> int:
    """Dependent norms: those of the layer itself, and one of queries and keys."""
    own = sum("norm" in name or name.startswith("ln_") for name in layer.children())
    of_queries = any(name.endswith(("q_norm", "q_layernorm")) for name, _ in layer.named_modules())
    return own + of_queries


SHAPES = {
    "llama-3.2-1b": decoder_shape("Llama-3.2-1B", 128256, 2048, 16, 8192, (32, 8, 64), 2),
    "qwen3-0.6b": decoder_shape("Qwen3-0.6B", 151936, 1024, 28, 3072, (16, 8, 128), 3),
    "gemma-3-270m": decoder_shape("Gemma-3-270M", 262144, 640, 18, 2048, (4, 1, 256), 5),
    "gemma-3-1b": decoder_shape("Gemma-3-1B", 262144, 1152, 26, 6912, (4, 1, 256), 5),
    "smollm2": decoder_shape("SmolLM2-135M", 49152, 576, 30, 1536, (9, 3, 64), 2),
}
