"""A model's own MTP layer, which mlx-lm leaves out when it converts a model.

It is in the model's folder, else in its original, of which no more is fetched. mlx-vlm knows which
tensors belong to it.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..common.new_folder import new_file
from ..common.tables import megabytes
from .compat import mlx_vlm as compat
from .fetch import DRAFTERS, home, kept_in, reason
from .finer_head import Say, find_original_head
from .locate import find_head
from .origin import local_origin
from .original import base_model, name_of_source, shown_name
from .tensor_files import ENDING, Tensor, copy_tensors, read_json, selected_tensors
from .trained_drafter import (
    CONFIG,
    TrainedDrafter,
    check_installed,
    is_trained_drafter,
    read_config,
)

# With 4, far fewer drafts are right.
BITS = 8


def load_own_drafter(
    model: nn.Module,
    folder: Path,
    source: str | Path | bool = True,
    *,
    say: Say = print,
    progress: bool = True,
) -> TrainedDrafter:
    """Loads the MTP layer of a model, in 8 bits unless its folder has it in fewer.

    It is in the model's folder, else in the cache, else fetched from the original and cached.

    Args:
        model: Of mlx-lm.
        folder: The model's folder.
        source: The original's repository or folder, or True for the one that the model names.
        say: Hears where it comes from.
        progress: Show a bar while it is fetched.

    Raises:
        ValueError: In one sentence, if there is none, or it cannot be had.
    """
    check_installed("An MTP layer")
    config = read_config(folder)
    splitter = _splitter_of(config, shown_name(folder))
    text_config = splitter.read_text_config(config)
    if any(True for _ in splitter.iter_selected(folder, text_config)):
        made, weights = _prepared(splitter, folder, config, str(folder))
        say(f"With the MTP layer in {folder}.")
    else:
        made, weights, original = _cached_or_fetched(model, folder, source, say, progress)
        say(f"With the MTP layer of {original}, in {BITS} bits.")
    drafter = TrainedDrafter(_module(made, weights), made, f"The MTP layer of {folder.name}")
    drafter.check_target(model)
    return drafter


def _splitter_of(config: dict[str, Any], name: str) -> Any:
    splitter = compat.drafter_splitter(config)
    if splitter is None or splitter.output_model_type not in compat.available_drafters():
        raise ValueError(
            f"{name} is a {config.get('model_type')!r} model, whose MTP layer the installed "
            "mlx-vlm cannot run: leave `mtp` out."
        )
    return splitter


def _prepared(
    splitter: Any, folder: Path, config: dict[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The configuration and the weights of the drafter whose tensors are in a folder's files."""
    # mlx-vlm's code takes the tensors as they should be, and raises any type.
    try:
        prepared = splitter.prepare(folder, source_config=config, q_bits=BITS)
    except Exception as error:
        raise ValueError(
            f"The MTP layer of {source} cannot be read ({reason(error)}): leave `mtp` out."
        ) from error
    return cast(tuple[dict[str, Any], dict[str, mx.array]], prepared)


def _module(config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    # mlx-vlm's code raises any type.
    try:
        return compat.drafter_of(config, weights)
    except Exception as error:
        raise ValueError(
            f"mlx-vlm cannot load the MTP layer ({reason(error)}): leave `mtp` out."
        ) from error


def _cached_or_fetched(
    model: nn.Module, folder: Path, source: str | Path | bool, say: Say, progress: bool
) -> tuple[dict[str, Any], dict[str, mx.array], str]:
    """The drafter's configuration, its weights, and the source that they are from."""
    rows = find_head(model).rows()
    cached = home() / DRAFTERS / f"{rows.fingerprint[:24]}-{BITS}{ENDING}"
    with kept_in(cached.parent, "The MTP layer"):
        known = _read(cached)
        if known is None or (source is not True and name_of_source(source) != known[2]):
            _fetch(model, folder, source, cached, say, progress)
            known = _read(cached)
    assert known is not None
    return known


def _read(cached: Path) -> tuple[dict[str, Any], dict[str, mx.array], str] | None:
    """What is cached, if it can be read."""
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        weights, about = cast(Any, mx.load(str(cached), return_metadata=True))
        return json.loads(about["config"]), weights, about["original"]
    return None


def _fetch(
    model: nn.Module,
    folder: Path,
    source: str | Path | bool,
    cached: Path,
    say: Say,
    progress: bool,
) -> None:
    """Fetches the tensors of the original's MTP layer, and keeps them in 8 bits."""
    if source is True:
        original = base_model(folder, "mtp")
    else:
        original = name_of_source(source)
    config = read_json(original, CONFIG)
    if is_trained_drafter(config):
        raise ValueError(
            f"{original} is a drafter itself: give it as `draft_model`, and leave `mtp` out."
        )
    splitter = _splitter_of(config, original)
    find_original_head(find_head(model), folder, original, "mtp")
    tensors = _tensors(splitter, original, config)
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    say(f"Fetching the MTP layer of {original} ({megabytes(n_bytes)}).")
    # The file is there whole or not at all.
    with new_file(cached) as file:
        with tqdm(
            total=n_bytes, unit="B", unit_scale=True, desc="MTP layer", disable=not progress
        ) as bar:
            copy_tensors(tensors, file.with_name(f"original{ENDING}"), bar)
        made, weights = _prepared(splitter, file.parent, config, original)
        about = {
            "format": "mlx",
            "model": local_origin(folder).known_as,
            "original": original,
            "config": json.dumps(made),
        }
        mx.save_safetensors(str(file), weights, metadata=about)


def _tensors(splitter: Any, original: str, config: dict[str, Any]) -> list[Tensor]:
    text_config = splitter.read_text_config(config)
    tensors = selected_tensors(original, lambda name: splitter.select_keys(name, text_config))
    if not tensors:
        raise ValueError(f"{original} has no MTP layer: leave `mtp` out.")
    return tensors
