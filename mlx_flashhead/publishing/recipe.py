"""The recipe of a checkpoint: the command that makes it again, and the versions."""

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
    """The recipe that a checkpoint stores: JSON-ready, and without paths of this machine.

    Args:
        flags: Flags of ``mlx_flashhead.convert`` that change the result, with their values.
        model: The converted model by a name that others can use.
        revision: Its commit, if it has one.
        seed: Seed of the conversion.
        name: Name of the result.
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
    versions = {package: version(package) for package in PACKAGES}
    recipe = {
        "name": name,
        "model": model,
        "command": shlex.join(words),
        "versions": {"python": platform.python_version(), "mlx_flashhead": __version__} | versions,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    return recipe | ({"files": files} if files else {})
