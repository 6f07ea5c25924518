"""The peak of memory while a head is loaded, dense and with a FlashHead.

Each form is loaded in a process of its own, since a process keeps what it once had.
"""

import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..head.formats import USUAL_GROUP
from ..loading.load import load
from ..models.dense import load_dense
from ..models.fetch import resolve
from ..models.install import install, installed_head
from .head import CLUSTER_SIZE, random_centroids

DENSE, FLASH_HEAD = "dense", "FlashHead"
FORMS = {"float32": (mx.float32, 16), "bfloat16": (mx.bfloat16, 16), "4-bit": (mx.bfloat16, 4)}
FILE = "model.safetensors"


class _OnlyHead(nn.Module):
    """An output projection behind an embedding of a few tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, form: str):
        super().__init__()
        self.embed = nn.Embedding(8, hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        dtype, bits = FORMS[form]
        self.set_dtype(dtype)
        if bits != 16:
            self.lm_head = self.lm_head.to_quantized(USUAL_GROUP, bits)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.lm_head(self.embed(ids))


def head_memory(vocab_size: int, hidden_size: int, *, n_probes: int) -> list[dict]:
    """Loads random heads of each form from a file, dense and with a FlashHead.

    Args:
        vocab_size: Rows V.
        hidden_size: Width D, a multiple of 64.
        n_probes: Clusters scored.

    Returns:
        For each form of rows, megabytes and heads, JSON-ready.

    Raises:
        ValueError: If the rows cannot be quantized.
    """
    if hidden_size % USUAL_GROUP:
        raise ValueError(f"A width of {hidden_size} cannot be quantized: give another --shape.")
    found = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / FILE)
            shape = (vocab_size, hidden_size, form)
            head_bytes = _alone(_write_head, path, *shape)
            measured = {
                name: _alone(_load_head, path, *shape, n_probes if name == FLASH_HEAD else None)
                for name in (DENSE, FLASH_HEAD)
            }
        found.append(_summary(form, head_bytes, measured))
    return found


def model_memory(path_or_repo: str) -> dict:
    """Loads a FlashHead checkpoint, dense and as it is.

    Returns:
        Megabytes and heads, JSON-ready.

    Raises:
        ValueError: If it cannot be loaded.
    """
    folder = str(resolve(path_or_repo))
    measured = {name: _alone(_load_model, folder, name) for name in (DENSE, FLASH_HEAD)}
    head_bytes = int(measured[FLASH_HEAD].pop("head_bytes"))
    form = str(measured[FLASH_HEAD].pop("form"))
    return _summary(form, head_bytes, measured)


def _summary(form: str, head_bytes: int, measured: dict[str, dict]) -> dict:
    """With ``more_heads``: the peak beyond the dense model, in heads."""
    dense, flash = measured[DENSE], measured[FLASH_HEAD]
    more = flash["peak_mb"] - dense["held_mb"]
    return {
        "form": form,
        "head_mb": head_bytes / 1e6,
        "memory": measured,
        "more_heads": more / (head_bytes / 1e6),
    }


def _alone(function, *arguments):
    """Calls it in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _write_head(path: str, vocab_size: int, hidden_size: int, form: str) -> int:
    mx.random.seed(0)
    model = _OnlyHead(vocab_size, hidden_size, form)
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(path, arrays)
    return sum(array.nbytes for name, array in arrays.items() if name.startswith("lm_head."))


def _load_head(
    path: str, vocab_size: int, hidden_size: int, form: str, n_probes: int | None
) -> dict:
    model = _OnlyHead(vocab_size, hidden_size, form)
    model.load_weights(path)
    mx.eval(model.parameters())
    if n_probes is not None:
        n_clusters = -(-vocab_size // CLUSTER_SIZE)
        slots = np.full(n_clusters * CLUSTER_SIZE, vocab_size)
        slots[:vocab_size] = np.random.default_rng(0).permutation(vocab_size)
        centroids = random_centroids(n_clusters, hidden_size)
        mx.eval(centroids.matrix.arrays(), centroids.bias, centroids.tail_offset)
        mx.reset_peak_memory()
        install(model, slots.reshape(n_clusters, -1), centroids, n_probes=n_probes)
    return _taken()


def _load_model(folder: str, name: str) -> dict:
    if name == DENSE:
        load_dense(Path(folder))
        return _taken()
    model, _ = load(folder)
    rows = installed_head(model).clustered.token_rows()  # without padded slots; lazy
    return _taken() | {"head_bytes": rows.nbytes, "form": str(rows.format)}


def _taken() -> dict:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "peak_mb": mx.get_peak_memory() / 1e6,
        "held_mb": mx.get_active_memory() / 1e6,
        "process_peak_mb": process / 1e6,
    }
