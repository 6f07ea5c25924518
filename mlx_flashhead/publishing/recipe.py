"""How a checkpoint was made: the command that makes it again, and with which versions."""

import hashlib
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from ..version import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")
# Of the arguments, those that do not change what is made, and those that stand elsewhere.
NOT_SHOWN = (
    "hf_path", "mlx_path", "revision", "seed", "upload", "upload_repo", "private", "overwrite",
    "progress", "base_model", "license",
)  # fmt: skip
SHORT = {"quantize": "-q", "dequantize": "-d"}


def make_recipe(
    arguments: Mapping[str, object],
    defaults: Mapping[str, object],
    *,
    model: str,
    revision: str | None,
    name: str,
) -> dict:
    """What is stored of a conversion.

    Args:
        arguments: Of `conversion.convert`.
        defaults: Their defaults.
        model: What was converted, as others can name it.
        revision: Its commit, if it has one.
        name: What the result is called.

    Returns:
        ``name``, ``command``, ``versions``, ``platform`` and, where files were read, their SHA-256
        as ``files``: JSON-ready, and without paths of this machine.
    """
    words = ["mlx_flashhead.convert", "--hf-path", model]
    if revision is not None:
        words += ["--revision", revision]
    files = {}
    for key, value in arguments.items():
        if key in NOT_SHOWN or value == defaults.get(key):
            continue
        flag = SHORT.get(key, "--" + key.replace("_", "-"))
        if isinstance(value, bool):
            words.append(flag)
        elif callable(value):
            words += [flag, "FUNCTION"]  # given in Python
        elif key == "calibration" and Path(str(value)).expanduser().is_file():
            file = Path(str(value)).expanduser()
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            words += [flag, file.name]
        else:
            words += [flag, str(value)]
    words += ["--seed", str(arguments["seed"]), "--mlx-path", name]
    recipe = {
        "name": name,
        "command": shlex.join(words),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    return recipe | ({"files": files} if files else {})


def _versions() -> dict[str, str]:
    return {"mlx_flashhead": __version__} | {package: version(package) for package in PACKAGES}
