"""The sizes of models that an estimate needs: of well-known ones, and of any that mlx-lm loads."""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..head.formats import AFFINE, DEFAULT_GROUP, FLOATS, find_format
from ..index.files import FlashHeadIndex
from ..models.locate import find_head
from . import data

CLUSTER_SIZE = 16
# projections in, rotation, cache, attention, projection out, addition; gate and up, activation,
# down, addition. Independent kernels run at once. Norms are added.
LAYER_KERNELS = 10


def bytes_per_weight(bits: int, group_size: int = DEFAULT_GROUP) -> float:
    """Of floats of 16 bits, or of affine rows of fewer, with their scales and offsets."""
    if bits == 16:
        return find_format(FLOATS, bits).bytes_per_weight()
    return find_format(AFFINE, bits).bytes_per_weight(group_size)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the estimate uses.

    A layer has ``layer_kernels`` dependent kernels. ``body_weights`` are those of matrices without
    embeddings, ``cache_values`` the keys and values of a token in all layers, 0 if they are not
    known. The number of probes is assumed unless ``measured_probes``. The last three are those of a
    checkpoint: bytes of the body and of the head's rows, and their precision, such as "4-bit".
    """

    name: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    layer_kernels: int
    body_weights: int
    tied: bool
    n_clusters: int
    cluster_size: int
    n_probes: int
    centroid_bytes: int
    cache_values: int = 0
    measured_probes: bool = False
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
        return replace(self, n_probes=n_probes, measured_probes=True)


def model_shape(name: str, model: nn.Module, index: FlashHeadIndex | None = None) -> ModelShape:
    """The shape of an mlx-lm model without an installed FlashHead; its weights may be lazy.

    Without an ``index`` it has clusters of 16 and centroids of 4 bits.

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
        arrays = {k: a for k, a in module.items() if isinstance(a, mx.array) and k[0] != "_"}
        stored += sum(array.nbytes for array in arrays.values())
        matrix = arrays.get("weight")
        if matrix is None or matrix.ndim < 2:
            continue
        if matrix.ndim == 3 and "Switch" in type(module).__name__:
            raise ValueError(
                f"{name} is a mixture of experts, which reads only some of its weights per token: "
                "the estimate is for dense models."
            )
        weights += matrix.size * 32 // module.bits if "scales" in arrays else matrix.size
    shape = _with_usual_index(
        name,
        rows.n_rows,
        rows.hidden_size,
        n_layers=len(layers),
        layer_kernels=LAYER_KERNELS + _norms(layers[0]),
        body_weights=weights,
        tied=location.tied,
        body_bytes=stored,
        head_bytes=rows.nbytes,
        stored=f"{rows.format.bits}-bit",
    )
    if index is None:
        return shape
    return replace(
        shape,
        n_clusters=index.config.n_clusters,
        cluster_size=index.config.cluster_size,
        n_probes=index.config.n_probes,
        centroid_bytes=index.centroids.routing_bytes,
        measured_probes=True,
    )


def _with_usual_index(name: str, vocab_size: int, hidden_size: int, **sizes) -> ModelShape:
    """With the conversion's usual index; a sixteenth of its clusters, 512 at least, is assumed."""
    n_clusters = -(-vocab_size // CLUSTER_SIZE)
    return ModelShape(
        name,
        vocab_size,
        hidden_size,
        n_clusters=n_clusters,
        cluster_size=CLUSTER_SIZE,
        n_probes=min(max(512, n_clusters // 16), n_clusters),
        centroid_bytes=round(n_clusters * (hidden_size * bytes_per_weight(4) + 4)),
        **sizes,
    )


def _norms(layer: nn.Module) -> int:
    """Kernels of dependent norms: those of the layer itself, and one of queries and keys."""
    children = layer.children().items()
    norms = [module for name, module in children if "norm" in name or name.startswith("ln_")]
    named = layer.named_modules()
    norms += [module for name, module in named if name.endswith(("q_norm", "q_layernorm"))][:1]
    # another one, such as Gemma's, adds one to its weight first
    return sum(1 if type(norm).__module__.startswith("mlx.nn") else 2 for norm in norms)


def _decoder(row: dict) -> ModelShape:
    """The shape of a row of data/models.csv, an ordinary decoder."""
    n_layers, hidden_size, kv_heads = row["n_layers"], row["hidden_size"], row["kv_heads"]
    attention = 2 * hidden_size * row["head_size"] * (row["heads"] + kv_heads)
    shape = _with_usual_index(
        row["name"],
        row["vocab_size"],
        hidden_size,
        n_layers=n_layers,
        layer_kernels=LAYER_KERNELS + row["norms"],
        body_weights=n_layers * (attention + 3 * hidden_size * row["intermediate_size"]),
        tied=row["tied"],
        cache_values=2 * n_layers * kv_heads * row["head_size"],
    )
    return shape.with_probes(row["n_probes"]) if row["n_probes"] else shape


SHAPES = {row["shape"]: _decoder(row) for row in data.read("models")}
