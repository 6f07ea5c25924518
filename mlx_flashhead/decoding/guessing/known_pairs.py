"""What earlier texts have shown of trained drafters, kept on this machine beside the speeds."""

from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import mlx.nn as nn

from ...common.stored import store, stored
from ...models.trained_drafter import TrainedDrafter
from ...wide.store import key_of, path_of
from .depth import Known


class _Pair(NamedTuple):
    """A drafter and its target.

    Attributes:
        known: What is known of them.
        place: The file of that; None where nothing is stored.
        key: Under which it stands there.
    """

    known: Known
    place: Path | None
    key: str


_pairs: WeakKeyDictionary[TrainedDrafter, _Pair] = WeakKeyDictionary()


def known_of(drafter: TrainedDrafter, model: nn.Module) -> Known:
    """What is known of a drafter and its target. The first call in a process reads a file.

    Args:
        drafter: The drafter.
        model: Its target.
    """
    if drafter not in _pairs:
        key = key_of(f"drafts of {drafter.source}")
        place = path_of(model)
        if place is not None:
            name = sha256(f"{place.stem} {drafter.source}".encode()).hexdigest()
            place = place.with_name(f"{name[:24]}.json")
        known = {}
        if place is not None:
            known = stored(place, Known)
        _pairs[drafter] = _Pair(known.get(key, Known()), place, key)
    return _pairs[drafter].known


def keep(drafter: TrainedDrafter) -> None:
    """Writes what is known of a drafter by now."""
    pair = _pairs[drafter]
    if pair.place is not None:
        store(pair.place, stored(pair.place, Known) | {pair.key: pair.known})
