"""What earlier texts have shown of drafters, kept on this machine beside the speeds."""

import weakref
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import mlx.nn as nn

from ...common.stored import store, stored
from ...models.trained_drafter import TrainedDrafter
from ...wide.store import key_of, path_of
from .depth import Known, Shares

# What drafts: a smaller model, or a drafter that was trained with its target.
Drafter = nn.Module | TrainedDrafter


class _Pair(NamedTuple):
    """A drafter and its target.

    Attributes:
        known: What is known of them.
        path: The file of that; None where nothing is stored.
        key: Under which it stands there.
    """

    known: Known
    path: Path | None
    key: str


# Those in use, by the ids of the drafter and its target.
_pairs: dict[tuple[int, int], _Pair] = {}


def known_of(drafter: Drafter, model: nn.Module) -> Known:
    """What is known of a drafter and its target. The first call in a process reads a file.

    Args:
        drafter: The drafter.
        model: Its target.
    """
    ids = id(drafter), id(model)
    if ids not in _pairs:
        _pairs[ids] = _read(drafter, model)
        weakref.finalize(drafter, _pairs.pop, ids, None)
        weakref.finalize(model, _pairs.pop, ids, None)
    return _pairs[ids].known


def keep(drafter: Drafter, model: nn.Module, shares: Shares) -> None:
    """Adds what a text has shown to what is known of a drafter and its target, and writes it."""
    pair = _pairs[id(drafter), id(model)]
    shares.leave_to(pair.known)
    if pair.path is not None:
        store(pair.path, stored(pair.path, Known) | {pair.key: pair.known})


def _read(drafter: Drafter, model: nn.Module) -> _Pair:
    """What the file of a pair has for this machine."""
    path = path_of(model)
    source = _source(drafter)
    if path is None or source is None:
        return _Pair(Known(), None, "")
    key = key_of(f"drafts of {source}")
    name = sha256(f"{path.stem} {source}".encode()).hexdigest()
    path = path.with_name(f"{name[:24]}.json")
    return _Pair(stored(path, Known).get(key, Known()), path, key)


def _source(drafter: Drafter) -> str | None:
    """What a drafter is called: its repository, or a model's fingerprint; None if it has none."""
    if isinstance(drafter, TrainedDrafter):
        return drafter.source
    path = path_of(drafter)
    if path is None:
        return None
    return path.stem
