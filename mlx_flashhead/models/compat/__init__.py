"""The names of mlx-lm that may move from one version to the next, a file per module of mlx-lm.
Tested with mlx-lm 0.31.3 to 0.32.2 and mlx 0.31.2 to 0.32.4."""

import warnings
from importlib.metadata import version


def warn_of_later(package: str, installed: str) -> None:
    """Warns of a version that is later than the tested ones. Nothing is known to break with it."""
    if tuple(int(part) for part in installed.split(".")[:2]) > (0, 32):
        warnings.warn(
            f"mlx_flashhead is tested with {package} up to 0.32, and {installed} is installed: if "
            f"it fails, install {package}<0.33.",
            stacklevel=2,
        )


for name in ("mlx", "mlx-lm"):
    warn_of_later(name, version(name))
