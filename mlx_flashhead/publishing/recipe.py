"""How a checkpoint was made: the command that makes it again, and with which versions."""

import hashlib
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from ..version import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")
CALIBRATION = "--calibration"  # the flag that may name a file


def make_recipe(
    flags: Mapping[str, object], *, model: str, revision: str | None, seed: int, name: str
) -> dict:
    """What is stored of a conversion.

    Args:
        flags: Of ``mlx_flashhead.convert`` with their values, as far as they change what is made.
        model: What was converted, as others can name it.
        revision: Its commit, if it has one.
        seed: Of the conversion.
        name: What the result is called.

    Returns:
        ``name``, ``command``, ``versions``, ``platform`` and, where files were read, their SHA-256
        as ``files``: JSON-ready, and without paths of this machine.
    """
    words = ["mlx_flashhead.convert", "--hf-path", model]
    if revision is not None:
        words += ["--revision", revision]
    files = {}
    for flag, value in flags.items():
        words.append(flag)
        if isinstance(value, bool):
            continue
        file = Path(str(value)).expanduser()
        if callable(value):
            words.append("FUNCTION")  # given in Python
        elif flag == CALIBRATION and file.is_file():
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            words.append(file.name)
        else:
            words.append(str(value))
    words += ["--seed", str(seed), "--mlx-path", name]
    recipe = {
        "name": name,
        "command": shlex.join(words),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    return recipe | ({"files": files} if files else {})


def _versions() -> dict[str, str]:
    return {"mlx_flashhead": __version__} | {package: version(package) for package in PACKAGES}
