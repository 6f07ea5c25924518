"""Replaces names for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **names: Any) -> Iterator[None]:
    """Within the block, globals of a module or attributes of an object have other values."""
    own = {name: vars(owner)[name] for name in names if name in vars(owner)}
    try:
        for name, value in names.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in names:
            if name in own:
                setattr(owner, name, own[name])
            else:  # a class's parent has it
                delattr(owner, name)
