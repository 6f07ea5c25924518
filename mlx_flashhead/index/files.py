"""Reads and writes a FlashHead: beside a model's weights, where plain mlx-lm ignores the file
``flash_head.index`` and a key of ``config.json``, or with ``flash_head.json`` in its own folder.

The index is a safetensors file with another ending, since mlx-swift-lm up to 3.31.4, and mlx-vlm
without ``model.safetensors.index.json``, load every ``*.safetensors`` and reject unknown arrays.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.tables import percent
from ..head.clustered import Centroids
from ..head.matrix import ARRAYS, Matrix, as_float32
from .settings import AGAIN, FlashHeadConfig

FILE_NAME, SETTINGS_NAME = "flash_head.index", "flash_head.json"
CONFIG_NAME, CONFIG_KEY = "config.json", "flash_head"

# Rows that an index of others serves: their other precisions and most fine-tunes (docs/quality.md).
MIN_COSINE, MAX_LENGTH_CHANGE = 0.94, 0.05


@dataclass(frozen=True)
class Sketch:
    """Evenly spaced rows of a head, independent of their format."""

    directions: mx.array  # (64, D) float16, of length 1
    lengths: mx.array  # (64,) float32

    @classmethod
    def of(cls, rows: Matrix) -> "Sketch":
        sample = as_float32(rows.sample().dequantized(mx.float32))
        lengths = np.linalg.norm(sample, axis=1)
        directions = sample / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
        return cls(mx.array(directions.astype(np.float16)), mx.array(lengths))

    def likeness(self, rows: Matrix) -> tuple[float, float]:
        """Compares with rows of the same shape (V, D): the mean cosine of the rows, and the median
        change of their lengths, as a share."""
        other = Sketch.of(rows)
        cosines = (as_float32(self.directions) * as_float32(other.directions)).sum(axis=1)
        lengths = np.stack([self.lengths, other.lengths])
        longer = lengths.max(axis=0)
        there = longer > 0  # rows of zeros have no direction
        if not there.any():
            return 1.0, 0.0
        change = np.ptp(lengths, axis=0)[there] / longer[there]
        return float(cosines[there].mean()), float(np.median(change))


@dataclass(frozen=True)
class FlashHeadIndex:
    """A FlashHead without its rows."""

    config: FlashHeadConfig
    token_ids: np.ndarray  # (C, cluster_size) uint32, V in padded slots
    centroids: Centroids
    sketch: Sketch  # of its own rows

    def check_fit(self, rows: Matrix, source: str) -> str | None:
        """Compares with the rows of a model: a sentence for near rows, a ValueError for others."""
        n_rows, width = self.config.vocab_size, self.sketch.directions.shape[1]
        wrong = f"is for {n_rows} tokens of width {width}, but the model has "
        wrong += f"{rows.n_rows} of width {rows.hidden_size}"
        if (rows.n_rows, rows.hidden_size) == (n_rows, width):
            if rows.fingerprint == self.config.fingerprint:
                return None
            cosine, length_change = self.sketch.likeness(rows)
            figures = f"mean cosine {cosine:.3f}, lengths {percent(length_change, 1)} apart"
            if cosine >= MIN_COSINE and length_change <= MAX_LENGTH_CHANGE:
                form = f"another form of these rows ({figures})"
                return f"The FlashHead in {source} was made from {form}: used as it is."
            wrong = f"belongs to other rows than this model's ({figures})"
        remedy = "give the one made for this model, or leave it out and one is found or built"
        raise ValueError(f"The FlashHead in {source} {wrong}: {remedy}.")


def write_index(folder: Path, index: FlashHeadIndex) -> None:
    """Adds ``index`` to an mlx-lm folder and replaces an earlier one."""
    config = _read_json(folder / CONFIG_NAME) | {CONFIG_KEY: index.config.to_dict()}
    _write(folder, index, CONFIG_NAME, config)


def write_companion(folder: Path, index: FlashHeadIndex) -> None:
    """Writes ``index`` into a folder of its own."""
    _write(folder, index, SETTINGS_NAME, index.config.to_dict())


def _write(folder: Path, index: FlashHeadIndex, name: str, settings: dict[str, Any]) -> None:
    centroids = index.centroids
    arrays = {
        "token_ids": mx.array(index.token_ids),
        "centroid_bias": centroids.bias,
        "tail_offset": centroids.tail_offset,
        **{f"sketch.{name}": array for name, array in vars(index.sketch).items()},
        **{f"centroids.{name}": array for name, array in centroids.matrix.arrays().items()},
    }
    fingerprint = index.config.fingerprint  # ties the file to its settings and the rows
    metadata = {"format": "mlx", "fingerprint": fingerprint, "checksum": _checksum(arrays)}
    with (folder / FILE_NAME).open("wb") as file:  # MLX would add .safetensors to a name
        mx.save_safetensors(file, arrays, metadata=metadata)
    (folder / name).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def has_flash_head(folder: Path) -> bool:
    """Whether a folder holds a FlashHead, beside a model or by itself."""
    return (folder / FILE_NAME).exists() and _settings(folder)[0] is not None


def is_companion(folder: Path) -> bool:
    """Whether a folder holds a FlashHead without its model."""
    return (folder / SETTINGS_NAME).exists() and not (folder / CONFIG_NAME).exists()


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe in the settings of a folder, of any version; None without settings."""
    with suppress(ValueError, AttributeError):
        recipe = _settings(folder)[0].get("recipe", {})
        return recipe if isinstance(recipe, dict) else None
    return None


def read_settings(folder: Path) -> FlashHeadConfig:
    """Reads the settings of a FlashHead, without its arrays; raises as `read_index`."""
    entry, source = _settings(folder)
    if entry is None:
        command = f"mlx_flashhead.convert --model {folder} --mlx-path NEW_FOLDER"
        raise ValueError(f"{folder} holds no FlashHead: make one with `{command}`.")
    return FlashHeadConfig.from_dict(entry, str(folder / source))


def read_index(folder: Path) -> FlashHeadIndex:
    """Reads the FlashHead of a folder; ValueError if there is none, or if its files are missing,
    damaged, of another version, or do not belong together."""
    config, path = read_settings(folder), folder / FILE_NAME
    if not path.exists():
        raise ValueError(f"{path} is missing: fetch the file, or {AGAIN}.")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        if metadata.get("checksum") != _checksum(arrays):
            raise ValueError("Bytes have changed.")
    except (RuntimeError, ValueError) as error:
        wrong = f"{path} cannot be read because it is damaged or incomplete"
        raise ValueError(f"{wrong}: fetch the file again, or {AGAIN}.") from error
    index = _index_of(arrays, config)
    if index is None or metadata.get("fingerprint") != config.fingerprint:
        raise ValueError(
            f"{path} does not hold the arrays that its settings describe ({config.n_clusters} "
            f"clusters of {config.cluster_size}, each token once, no NaN, the same rows): fetch "
            f"both files again, or {AGAIN}."
        )
    return index


def _index_of(arrays: dict[str, mx.array], config: FlashHeadConfig) -> FlashHeadIndex | None:
    """The index of these arrays; None if they do not fit the settings."""
    form: dict[str, Any] = {}
    if config.centroid_group_size > 0:
        form = {"group_size": config.centroid_group_size, "bits": config.centroid_bits}
    try:
        names = ARRAYS if form else ARRAYS[:1]
        stored: Any = (arrays[f"centroids.{name}"] for name in names)
        matrix, token_ids = Matrix(*stored, **form), arrays["token_ids"]
        centroids = Centroids(matrix, arrays["centroid_bias"], arrays["tail_offset"])
        sketch = Sketch(arrays["sketch.directions"], arrays["sketch.lengths"])
    except KeyError:
        return None
    directions, lengths = sketch.directions, sketch.lengths
    width = directions.shape[1] if directions.ndim == 2 else 0
    fits = (
        token_ids.shape == (config.n_clusters, config.cluster_size)
        and token_ids.dtype == mx.uint32
        and centroids.fits(config.n_clusters, width)
        and (directions.shape, lengths.ndim) == ((lengths.size, width), 1)
        and (directions.dtype, lengths.dtype) == (mx.float16, mx.float32)
        and all(mx.isfinite(array).all() for array in arrays.values())
    )
    if not fits:
        return None
    ids = np.array(token_ids)
    # each token once, and V in the padded slots
    expected = np.minimum(np.arange(ids.size), config.vocab_size)
    each_once = np.array_equal(np.sort(ids, axis=None), expected)
    return FlashHeadIndex(config, ids, centroids, sketch) if each_once else None


def _checksum(arrays: dict[str, mx.array]) -> str:
    """SHA-256 (hex) over all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(bytes(arrays[name].reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def _settings(folder: Path) -> tuple[Any, str]:
    """The settings in a folder, None without any, and their place in it."""
    if (folder / SETTINGS_NAME).exists():
        return _read_json(folder / SETTINGS_NAME), SETTINGS_NAME
    config = _read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
    return config.get(CONFIG_KEY), f"{CONFIG_NAME}'s {CONFIG_KEY} entry"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # a number of thousands of digits too
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged, since it is not a JSON object: fetch it again.")
    return values
