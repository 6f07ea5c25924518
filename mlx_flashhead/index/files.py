"""Reads and writes a FlashHead: beside a model's weights, or in a folder of its own.

A model's folder stays an ordinary mlx-lm folder. ``flash_head.index`` lies beside the weights, and
``config.json`` has one more key. Plain mlx-lm ignores both. In a folder of its own the settings are
in ``flash_head.json``.

The index is a safetensors file with another ending, since mlx-swift-lm up to 3.31.4, and mlx-vlm
without ``model.safetensors.index.json``, load every ``*.safetensors`` and refuse unknown arrays.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.tables import percent
from ..head.clustered import Centroids
from ..head.matrix import Matrix
from .settings import AGAIN, FlashHeadConfig
from .sketch import MAX_LENGTH_CHANGE, MIN_COSINE, Sketch

FILE_NAME, SETTINGS_NAME = "flash_head.index", "flash_head.json"
CONFIG_NAME, CONFIG_KEY = "config.json", "flash_head"
REMEDY = "give the one made for this model, or leave it out and one is found or built"


@dataclass(frozen=True)
class FlashHeadIndex:
    """A FlashHead without its rows."""

    config: FlashHeadConfig
    token_ids: np.ndarray  # (C, cluster_size) uint32, V in padded slots
    centroids: Centroids
    sketch: Sketch  # of its own rows

    @property
    def hidden_size(self) -> int:
        """Width D of the rows."""
        return self.sketch.directions.shape[1]

    def check_fit(self, rows: Matrix, source: str) -> str | None:
        """Compares with the rows of a model: a sentence for near rows, a ValueError for others."""
        n_rows, width = self.config.vocab_size, self.hidden_size
        if (rows.n_rows, rows.hidden_size) != (n_rows, width):
            raise ValueError(
                f"The FlashHead in {source} is for {n_rows} tokens of width {width}, but the model "
                f"has {rows.n_rows} of width {rows.hidden_size}: {REMEDY}."
            )
        if rows.fingerprint == self.config.fingerprint:
            return None
        cosine, length_change = self.sketch.likeness(rows)
        figures = f"mean cosine {cosine:.3f}, lengths {percent(length_change, 1)} apart"
        if cosine < MIN_COSINE or length_change > MAX_LENGTH_CHANGE:
            raise ValueError(
                f"The FlashHead in {source} belongs to other rows than this model's ({figures}): "
                f"{REMEDY}."
            )
        return (
            f"The FlashHead in {source} was made from another form of these rows ({figures}): used "
            "as it is."
        )


def write_index(folder: Path, index: FlashHeadIndex) -> None:
    """Adds ``index`` to an mlx-lm folder and replaces an earlier one."""
    _write_arrays(folder, index)
    config = _read_json(folder / CONFIG_NAME) | {CONFIG_KEY: index.config.to_dict()}
    _write_json(folder / CONFIG_NAME, config)


def write_companion(folder: Path, index: FlashHeadIndex) -> None:
    """Writes ``index`` into a folder of its own."""
    _write_arrays(folder, index)
    _write_json(folder / SETTINGS_NAME, index.config.to_dict())


def has_flash_head(folder: Path) -> bool:
    """Whether a folder holds a FlashHead, beside a model or by itself."""
    return (folder / FILE_NAME).exists() and _settings(folder)[0] is not None


def is_companion(folder: Path) -> bool:
    """Whether a folder holds a FlashHead without its model."""
    return (folder / SETTINGS_NAME).exists() and not (folder / CONFIG_NAME).exists()


def is_written_here(folder: Path) -> bool:
    """Whether a folder has the settings of a FlashHead, of any version."""
    return stored_recipe(folder) is not None


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe in the settings of a folder, of any version; None without settings."""
    try:
        entry = _settings(folder)[0]
    except ValueError:
        return None
    recipe = entry.get("recipe", {}) if isinstance(entry, dict) else None
    return recipe if isinstance(recipe, dict) else None


def read_index(folder: Path) -> FlashHeadIndex:
    """Reads the FlashHead of a folder.

    Raises:
        ValueError: If there is none, if a file is missing, damaged or of another version, or if its
            arrays do not fit its settings.
    """
    config = read_settings(folder)
    path = folder / FILE_NAME
    if not path.exists():
        raise ValueError(f"{path} is missing: fetch the file, or {AGAIN}.")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        if metadata.get("checksum") != _checksum(arrays):
            raise ValueError("Bytes have changed.")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read because it is damaged or incomplete: fetch the file again, or "
            f"{AGAIN}."
        ) from error
    if metadata.get("fingerprint") != config.fingerprint:
        raise ValueError(
            f"{path} belongs to other rows than its settings describe: fetch both files again, or "
            f"{AGAIN}."
        )
    index = _index_of(arrays, config)
    if index is None:
        raise ValueError(
            f"{path} does not hold the arrays that its settings describe "
            f"({config.n_clusters} clusters of {config.cluster_size}, each token once, no NaN): "
            f"{AGAIN}."
        )
    return index


def read_settings(folder: Path) -> FlashHeadConfig:
    """Reads the settings of a FlashHead, without its arrays; raises as `read_index`."""
    entry, source = _settings(folder)
    if entry is None:
        raise ValueError(
            f"{folder} holds no FlashHead: make one with "
            f"`mlx_flashhead.convert --model {folder} --mlx-path NEW_FOLDER`."
        )
    return FlashHeadConfig.from_dict(entry, str(folder / source))


def _settings(folder: Path) -> tuple[Any, str]:
    """The settings in a folder, None without any, and their place in it."""
    if (folder / SETTINGS_NAME).exists():
        return _read_json(folder / SETTINGS_NAME), SETTINGS_NAME
    config = _read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
    return config.get(CONFIG_KEY), f"{CONFIG_NAME}'s {CONFIG_KEY} entry"


def _write_arrays(folder: Path, index: FlashHeadIndex) -> None:
    centroids = index.centroids
    arrays = {
        "token_ids": mx.array(index.token_ids),
        "centroid_bias": centroids.bias,
        "tail_offset": centroids.tail_offset,
        "sketch.directions": index.sketch.directions,
        "sketch.lengths": index.sketch.lengths,
    }
    arrays |= {f"centroids.{name}": array for name, array in centroids.matrix.arrays().items()}
    # the fingerprint ties the file to its settings and the rows
    fingerprint = index.config.fingerprint
    metadata = {"format": "mlx", "fingerprint": fingerprint, "checksum": _checksum(arrays)}
    with (folder / FILE_NAME).open("wb") as file:  # MLX would add .safetensors to a name
        mx.save_safetensors(file, arrays, metadata=metadata)


def _checksum(arrays: dict[str, mx.array]) -> str:
    """SHA-256 (hex) over all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(bytes(arrays[name].reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def _index_of(arrays: dict[str, mx.array], config: FlashHeadConfig) -> FlashHeadIndex | None:
    names, form = ["weight"], {}
    if config.centroid_group_size > 0:
        names += ["scales", "biases"]
        form = {"group_size": config.centroid_group_size, "bits": config.centroid_bits}
    try:
        token_ids = arrays["token_ids"]
        stored: dict[str, Any] = {name: arrays[f"centroids.{name}"] for name in names}
        matrix = Matrix(**stored | form)
        centroids = Centroids(matrix, arrays["centroid_bias"], arrays["tail_offset"])
        sketch = Sketch(arrays["sketch.directions"], arrays["sketch.lengths"])
    except KeyError:
        return None
    if not all(mx.isfinite(array).all() for array in arrays.values()):
        return None
    hidden_size = sketch.directions.shape[1] if sketch.directions.ndim == 2 else 0
    fits = (
        token_ids.shape == (config.n_clusters, config.cluster_size)
        and token_ids.dtype == mx.uint32
        and centroids.fits(config.n_clusters, hidden_size)
        and sketch.fits(hidden_size)
    )
    if not fits:
        return None
    ids = np.array(token_ids)
    counts = np.bincount(ids[ids < config.vocab_size], minlength=config.vocab_size)
    in_range = ids.max() <= config.vocab_size  # which marks a padded slot
    return (
        FlashHeadIndex(config, ids, centroids, sketch) if in_range and (counts == 1).all() else None
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # a number of thousands of digits too
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged, since it is not a JSON object: fetch it again.")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
