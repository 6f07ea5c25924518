"""The original of a converted model: the repository that its card names, or another source."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .origin import is_repository, local_origin

CARD = "README.md"


def name_of_source(source: str | Path | bool) -> str:
    """A named source, as the cache knows it: its path from the root, or its repository."""
    path = Path(str(source)).expanduser()
    if path.exists():
        return str(path.resolve())
    return str(source)


def base_model(folder: Path, keyword: str) -> str:
    """The one repository that a model's card, else its configuration, names as its base.

    Args:
        folder: The model's folder.
        keyword: The argument by which a user names another one, for the error.

    Raises:
        ValueError: If there is none, or the card cannot be fetched.
    """
    origin = local_origin(folder)
    name = shown_name(folder)
    card = folder / CARD
    in_cache = origin.revision is not None
    source: Any = card
    if in_cache and not card.exists():
        source = name
    # Cards and the Hub's client raise any type.
    with suppress(Exception):
        data: Any = ModelCard.load(source, ignore_metadata_errors=True).data
        base = data.base_model
        if isinstance(base, list) and len(base) == 1:
            base = base[0]
        if is_repository(base):
            return base
    if origin.repo_id is None or in_cache:
        raise ValueError(
            f"The card of {name} names no original (as its base_model), or cannot be fetched: name "
            f"one with `{keyword}`."
        )
    return origin.repo_id


def shown_name(folder: Path) -> str:
    """A model's repository, else the name of its folder, which others need not know."""
    origin = local_origin(folder)
    if origin.revision is None:
        return folder.resolve().name
    return origin.known_as
