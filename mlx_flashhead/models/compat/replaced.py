"""Other things under mlx-lm's own names, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **names: Any) -> Iterator[None]:
    """Within the block, mlx-lm's own code finds something else under its names.

    Args:
        owner: The module of a main program, or an object.
        **names: What the code shall find under its globals, or the attributes, of these names.
    """
    originals = {name: getattr(owner, name) for name in names}
    try:
        for name, value in names.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)
