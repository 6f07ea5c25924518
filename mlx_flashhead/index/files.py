"""Reads and writes a FlashHead as files.

It lies beside a model's weights, where plain mlx-lm ignores the file ``flash_head.index`` and a key
of ``config.json``, or with ``flash_head.json`` in a folder of its own.

The index is a safetensors file with another ending, since mlx-swift-lm up to 3.31.4, and mlx-vlm
without ``model.safetensors.index.json``, load every ``*.safetensors`` and reject unknown arrays.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..head.clustered import Centroids
from ..head.matrix import ARRAYS, Matrix
from .flash_head_config import AGAIN, FlashHeadConfig
from .flash_head_index import FlashHeadIndex, Sketch

FILE_NAME = "flash_head.index"
SETTINGS_NAME = "flash_head.json"
CONFIG_NAME = "config.json"
CONFIG_KEY = "flash_head"


def write_index(folder: Path, index: FlashHeadIndex) -> None:
    """Adds an index to an mlx-lm folder and replaces an earlier one."""
    config = _read_json(folder / CONFIG_NAME)
    config[CONFIG_KEY] = index.config.to_dict()
    _write(folder, index, CONFIG_NAME, config)


def write_companion(folder: Path, index: FlashHeadIndex) -> None:
    """Writes an index into a folder of its own."""
    _write(folder, index, SETTINGS_NAME, index.config.to_dict())


def _write(folder: Path, index: FlashHeadIndex, name: str, settings: dict[str, Any]) -> None:
    """Writes the arrays of an index, with what ties them to its rows, and a file of settings."""
    centroids = index.centroids
    arrays = {
        "token_ids": mx.array(index.token_ids),
        "centroid_bias": centroids.bias,
        "tail_offset": centroids.tail_offset,
        "sketch.directions": index.sketch.directions,
        "sketch.lengths": index.sketch.lengths,
    }
    for key, array in centroids.matrix.arrays().items():
        arrays[f"centroids.{key}"] = array
    metadata = {
        "format": "mlx",
        "fingerprint": index.config.fingerprint,
        "checksum": _checksum(arrays),
    }
    # MLX would add .safetensors to a name.
    with (folder / FILE_NAME).open("wb") as file:
        mx.save_safetensors(file, arrays, metadata=metadata)
    (folder / name).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def has_flash_head(folder: Path) -> bool:
    """Whether a folder holds a FlashHead, beside a model or by itself."""
    return (folder / FILE_NAME).exists() and _settings(folder)[0] is not None


def is_companion(folder: Path) -> bool:
    """Whether a folder holds a FlashHead without its model."""
    return (folder / SETTINGS_NAME).exists() and not (folder / CONFIG_NAME).exists()


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe in a folder's settings, which may be of any version; None without settings."""
    with suppress(ValueError, AttributeError):
        recipe = _settings(folder)[0].get("recipe", {})
        if isinstance(recipe, dict):
            return recipe
    return None


def read_settings(folder: Path) -> FlashHeadConfig:
    """Reads the settings of a FlashHead, without its arrays.

    Args:
        folder: The folder that holds it.

    Raises:
        ValueError: If there are none, or they are damaged or of another version.
    """
    entry, source = _settings(folder)
    if entry is None:
        raise ValueError(
            f"{folder} holds no FlashHead: make one with `mlx_flashhead.convert --model {folder} "
            "--mlx-path NEW_FOLDER`."
        )
    return FlashHeadConfig.from_dict(entry, str(folder / source))


def read_index(folder: Path) -> FlashHeadIndex:
    """Reads the FlashHead of a folder.

    Args:
        folder: The folder that holds it, beside a model or by itself.

    Raises:
        ValueError: If there is none, or if its files are missing, damaged, of another version, or
            do not belong together.
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
    try:
        matrix = _centroid_matrix(arrays, config)
        centroids = Centroids(matrix, arrays["centroid_bias"], arrays["tail_offset"])
        sketch = Sketch(arrays["sketch.directions"], arrays["sketch.lengths"])
        token_ids = arrays["token_ids"]
        n_sketched, width = sketch.directions.shape
    except (KeyError, ValueError):
        return None
    fits = (
        centroids.fits(config.n_clusters, width)
        and token_ids.shape == (config.n_clusters, config.cluster_size)
        and token_ids.dtype == mx.uint32
        and sketch.directions.dtype == mx.float16
        and sketch.lengths.dtype == mx.float32
        and sketch.lengths.shape == (n_sketched,)
        and all(mx.isfinite(array).all() for array in arrays.values())
    )
    ids = np.array(token_ids)
    # Each token once, and V in the padded slots.
    expected = np.minimum(np.arange(ids.size), config.vocab_size)
    if not fits or not np.array_equal(np.sort(ids, axis=None), expected):
        return None
    return FlashHeadIndex(config, ids, centroids, sketch)


def _centroid_matrix(arrays: dict[str, mx.array], config: FlashHeadConfig) -> Matrix:
    """The centroids as they are stored; KeyError if an array is missing."""
    if config.centroid_group_size == 0:
        return Matrix(arrays["centroids.weight"])
    stored: dict[str, Any] = {name: arrays[f"centroids.{name}"] for name in ARRAYS}
    return Matrix(**stored, group_size=config.centroid_group_size, bits=config.centroid_bits)


def _checksum(arrays: dict[str, mx.array]) -> str:
    """SHA-256 (hex) over all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(bytes(arrays[name].reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def _settings(folder: Path) -> tuple[Any, str]:
    """The settings in a folder, or None without any, and where in it they are."""
    if (folder / SETTINGS_NAME).exists():
        return _read_json(folder / SETTINGS_NAME), SETTINGS_NAME
    config: dict[str, Any] = {}
    if (folder / CONFIG_NAME).exists():
        config = _read_json(folder / CONFIG_NAME)
    return config.get(CONFIG_KEY), f"{CONFIG_NAME}'s {CONFIG_KEY} entry"


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError if the file is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        # A number of thousands of digits is a ValueError, too.
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged, since it is not a JSON object: fetch it again.")
    return values
