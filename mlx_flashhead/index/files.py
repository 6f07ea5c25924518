"""Reads and writes the FlashHead of a checkpoint.

The folder stays an ordinary mlx-lm folder. ``flash_head.safetensors`` lies beside the weights, and
``config.json`` has one more key. Plain mlx-lm ignores both.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..head.centroids import Centroids
from ..head.matrix import Matrix
from .settings import FlashHeadConfig

FILE_NAME = "flash_head.safetensors"
CONFIG_KEY = "flash_head"


@dataclass(frozen=True)
class FlashHeadIndex:
    """A FlashHead without its rows.

    Attributes:
        config: Settings and measured report.
        token_ids: (C, cluster_size) uint32, V in padded slots.
        centroids: Centroids, bias and tail offset.
    """

    config: FlashHeadConfig
    token_ids: np.ndarray
    centroids: Centroids


def write_index(folder: Path, index: FlashHeadIndex) -> None:
    """Adds ``index`` to an mlx-lm folder and replaces an earlier one."""
    centroids = index.centroids
    arrays = {
        "token_ids": mx.array(index.token_ids),
        "centroid_bias": centroids.bias,
        "tail_offset": centroids.tail_offset,
    }
    arrays |= {f"centroids.{name}": array for name, array in centroids.matrix.arrays().items()}
    # the fingerprint ties the file to the model's rows
    metadata = {"format": "mlx", "fingerprint": index.config.fingerprint}
    mx.save_safetensors(str(folder / FILE_NAME), arrays, metadata=metadata)
    config = _read_config(folder) | {CONFIG_KEY: index.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def has_flash_head(folder: Path) -> bool:
    """Whether a model's folder says that it is a FlashHead checkpoint.

    Raises:
        ValueError: If ``folder`` is not a model's folder.
    """
    return _read_config(folder).get(CONFIG_KEY) is not None


def read_index(folder: Path) -> FlashHeadIndex:
    """Reads the FlashHead of a checkpoint.

    Raises:
        ValueError: If the folder is not a FlashHead checkpoint, if the file is missing, damaged or
            of another version or model, or if its arrays do not fit its settings.
    """
    entry = _read_config(folder).get(CONFIG_KEY)
    if entry is None:
        raise ValueError(
            f"{folder} holds a model without FlashHead: convert it with "
            f"`mlx_flashhead.convert --model {folder} --mlx-path NEW_FOLDER`."
        )
    config = FlashHeadConfig.from_dict(entry)
    path = folder / FILE_NAME
    if not path.exists():
        raise ValueError(
            f"{path} is missing, but config.json describes a FlashHead: fetch the file, or "
            "convert the model again with mlx_flashhead.convert."
        )
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read because it is damaged or incomplete: fetch the file again, or "
            "convert the model again with mlx_flashhead.convert."
        ) from error
    if metadata.get("fingerprint", config.fingerprint) != config.fingerprint:
        raise ValueError(
            f"{path} belongs to other rows than config.json describes: fetch both files again, or "
            "convert the model again with mlx_flashhead.convert."
        )
    index = _index_of(arrays, config)
    if index is None:
        raise ValueError(
            f"{path} does not hold the arrays that config.json describes "
            f"({config.n_clusters} clusters of {config.cluster_size}): convert the model again "
            "with mlx_flashhead.convert."
        )
    return index


def _index_of(arrays: dict[str, mx.array], config: FlashHeadConfig) -> FlashHeadIndex | None:
    try:
        token_ids = arrays["token_ids"]
        matrix = Matrix(arrays["centroids.weight"])
        if config.centroid_group_size > 0:
            matrix = replace(
                matrix,
                scales=arrays["centroids.scales"],
                biases=arrays["centroids.biases"],
                group_size=config.centroid_group_size,
                bits=config.centroid_bits,
            )
        centroids = Centroids(matrix, arrays["centroid_bias"], arrays["tail_offset"])
    except KeyError:
        return None
    groups = matrix.weight if matrix.scales is None else matrix.scales
    hidden_size = math.prod(groups.shape[1:]) * max(config.centroid_group_size, 1)
    fits = (
        token_ids.shape == (config.n_clusters, config.cluster_size)
        and token_ids.dtype == mx.uint32
        and centroids.fits(config.n_clusters, hidden_size)
        and 1 <= config.n_probes <= config.n_clusters
    )
    if not fits:
        return None
    return FlashHeadIndex(config, np.array(token_ids), centroids)


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a model folder: it has no config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is damaged, since it is not a JSON object: fetch the model again."
        )
    return config
