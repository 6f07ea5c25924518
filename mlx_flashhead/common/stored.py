"""Files of what was measured on this machine, by name. A damaged one counts as empty."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from .new_folder import new_file

Positive = Annotated[float, msgspec.Meta(gt=0)]
Value = TypeVar("Value")


def stored(path: Path, of: type[Value]) -> dict[str, Value]:
    """What a file holds; nothing where it is not there, or holds other values than those."""
    with suppress(OSError, ValueError, RecursionError):
        return msgspec.json.decode(path.read_bytes(), type=dict[str, of])  # type: ignore[valid-type]
    return {}


def store(path: Path, values: dict[str, Value]) -> None:
    """Writes a file. Where it cannot be written, what it holds is measured again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write_bytes(msgspec.json.format(msgspec.json.encode(values), indent=1))
