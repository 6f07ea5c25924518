"""Tiny models for the tests: random mlx-lm models, heads, clusters and what is fitted to them."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_flashhead.conversion import run_task
from mlx_flashhead.conversion.centroids import fit_centroids
from mlx_flashhead.head.clustered import Centroids
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.index.flash_head_config import FlashHeadConfig
from mlx_flashhead.index.flash_head_index import FlashHeadIndex, Sketch
from mlx_flashhead.models.install import install
from mlx_flashhead.models.locate import find_head

VOCAB_SIZE = 203
HIDDEN_SIZE = 64

_COMMON = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 1,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
}
_WITH_HEAD_DIM = _COMMON | {"head_dim": 32}
# What each architecture needs besides ``vocab_size`` and, where it has the choice, the tying.
CONFIGS = {
    "llama": _COMMON,
    "qwen3": _WITH_HEAD_DIM | {"max_position_embeddings": 512, "rope_theta": 10000.0},
    "gemma2": _WITH_HEAD_DIM,
    "gemma3_text": _WITH_HEAD_DIM | {"query_pre_attn_scalar": 32, "sliding_window_pattern": 1},
    "cohere": _COMMON,
    "phi": _COMMON | {"partial_rotary_factor": 0.5},
    "minicpm": _COMMON | {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 12},
}
# How the rows of a random head are stored.
FORMS = {
    "float32": {},
    "float16": {"dtype": mx.float16},
    "bfloat16": {"dtype": mx.bfloat16},
    "4-bit": {"bits": 4},
    "4-bit-bfloat16": {"bits": 4, "dtype": mx.bfloat16},
    "8-bit-float16": {"bits": 8, "dtype": mx.float16},
    "mxfp4": {"bits": 4, "mode": "mxfp4"},
    "mxfp4-bfloat16": {"bits": 4, "mode": "mxfp4", "dtype": mx.bfloat16},
}


def tiny_model(
    arch="llama",
    *,
    tied=True,
    dtype=mx.float32,
    bits=None,
    group_size=32,
    mode="affine",
    seed=0,
    **overrides,
) -> nn.Module:
    """A random model with weights and biases that are large enough for logits that differ.

    ``bits`` quantizes the head and the linear layers; ``overrides`` are keys of the configuration.
    """
    architecture = importlib.import_module(f"mlx_lm.models.{arch}")
    config = {"model_type": arch, "tie_word_embeddings": tied, **CONFIGS[arch], **overrides}
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    if arch == "gemma3_text" and tied:
        # A model tells by the checkpoint's keys, not by the configuration.
        model.sanitize({})
    rng = np.random.default_rng(seed)

    def draw(array):
        scale = 0.1
        if array.ndim > 1:
            scale = 0.3
        values = rng.normal(scale=scale, size=array.shape).astype(np.float32)
        return mx.array(values + (array.ndim == 1)).astype(dtype)

    model.update(tree_map(draw, model.parameters()))
    model.eval()
    if bits is not None:
        nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    mx.eval(model.parameters())
    return model


def parameters(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Names, in order, and contents of all parameters."""
    flat = tree_flatten(model.parameters())
    return [(name, str(a.dtype), a.shape, bytes(a.view(mx.uint8))) for name, a in flat]


def random_rows(
    rng, vocab_size, hidden_size, *, dtype=mx.float32, bits=None, mode="affine", bias=False
) -> Matrix:
    """The rows of a random head."""
    weight = mx.array(rng.normal(scale=0.5, size=(vocab_size, hidden_size))).astype(dtype)
    if bias:
        bias = mx.array(rng.normal(size=vocab_size)).astype(dtype)
    else:
        bias = None
    rows = Matrix(weight, bias=bias)
    if bits is None:
        return rows
    return rows.quantize(group_size=32, bits=bits, mode=mode)


def random_clusters(rng: np.random.Generator, vocab_size: int, cluster_size: int) -> np.ndarray:
    """Token ids (C, cluster_size) uint32 in random order; padded slots anywhere, hold V."""
    n_clusters = -(-vocab_size // cluster_size)
    slots = np.full((n_clusters, cluster_size), -1)
    # Dealt out one by one: no cluster is all padding.
    for cluster in np.arange(slots.size - vocab_size) % n_clusters:
        slots[cluster, rng.choice(np.flatnonzero(slots[cluster] < 0))] = vocab_size
    slots[slots < 0] = rng.permutation(vocab_size)
    return rng.permutation(slots).astype(np.uint32)


def fitted(rows: Matrix, token_ids: np.ndarray) -> Centroids:
    """Centroids fitted to random states."""
    states = np.random.default_rng(0).normal(size=(50, rows.hidden_size)).astype(np.float32)
    weight = rows.dequantized().astype(mx.float32)
    if rows.bias is None:
        bias = None
    else:
        bias = rows.bias.astype(mx.float32)
    return run_task(fit_centroids(weight, token_ids, states, head_bias=bias, group_size=32))


def tiny_index(
    model, *, cluster_size=8, n_probes=4, eos_token_ids=(), seed=0, recipe=None, location=None
) -> FlashHeadIndex:
    """A FlashHead for ``model``: random clusters, fitted centroids."""
    if location is None:
        location = find_head(model)
    if recipe is None:
        recipe = {}
    rows = location.rows()
    token_ids = random_clusters(np.random.default_rng(seed), rows.n_rows, cluster_size)
    centroids = fitted(rows, token_ids)
    config = FlashHeadConfig(
        vocab_size=rows.n_rows,
        n_clusters=len(token_ids),
        cluster_size=cluster_size,
        n_probes=n_probes,
        unverified_probes=n_probes,
        eos_token_ids=tuple(eos_token_ids),
        centroid_bits=centroids.matrix.format.bits,
        centroid_group_size=centroids.matrix.group_size or 0,
        calibration={"source": "none"},
        report={"agreement": 0.5},
        recipe=recipe,
        fingerprint=rows.fingerprint,
    )
    return FlashHeadIndex(config, token_ids, centroids, Sketch.of(rows))


def install_index(model: nn.Module, index: FlashHeadIndex, **settings) -> FlashHead:
    """Installs a FlashHead on the model that it was made for."""
    known = {"n_probes": index.config.n_probes, "eos_token_ids": index.config.eos_token_ids}
    return install(model, index.token_ids, index.centroids, **known | settings)
