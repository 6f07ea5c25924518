"""Pictures that commands draw: checked before the work begins, drawn without a screen."""

from pathlib import Path

from .console import check_writable

SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def check_picture(option: str, path: str) -> None:
    """Makes sure, before long work, that a picture can be drawn into a file.

    Args:
        option: The option that names the file.
        path: The file.

    Raises:
        ValueError: If its suffix is unknown, or it cannot be written.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{option} {path} must end in {', '.join(SUFFIXES)}.")
    check_writable(option, path)
