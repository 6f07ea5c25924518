"""The names of mlx-vlm that may move. Its own programs and models alone import a file of this
folder, since it is an extra. Tested with 0.7.8 to 0.7.10: older ones decode by other modules."""

from importlib.metadata import version

OLDEST = (0, 7, 8)


def too_old() -> str | None:
    """The installed version of mlx-vlm, if a FlashHead cannot be under its models."""
    installed = version("mlx-vlm")
    parts = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    return installed if parts < OLDEST else None
