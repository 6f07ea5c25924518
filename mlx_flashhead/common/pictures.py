"""Pictures of the commands: checked before the work begins, drawn without a screen."""

from pathlib import Path
from types import ModuleType

from .command import check_writable
from .extras import from_extra

SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def check_picture(option: str, path: str) -> None:
    """Checks, before long work, that a picture can be drawn into the file of an option.

    Raises:
        ValueError: If the suffix is unknown, the file cannot be written, or matplotlib is not
            installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{option} {path} must end in {', '.join(SUFFIXES)}.")
    from_extra("matplotlib", "report", option)
    check_writable(option, path)


def pyplot() -> ModuleType:
    """``matplotlib.pyplot``, which draws into files only.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    from_extra("matplotlib", "report", "A picture").use("Agg")
    return from_extra("matplotlib.pyplot", "report", "A picture")
