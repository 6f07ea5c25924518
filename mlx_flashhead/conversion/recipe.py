"""The recipe of a FlashHead: the command that makes it again, and the versions."""

import hashlib
import platform
import shlex
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..publishing.origin import Origin, card_metadata
from ..version import __version__
from .options import ConvertOptions, IndexOptions, flag

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")


def make_recipe(options: IndexOptions, origin: Origin, name: str) -> dict[str, Any]:
    """The recipe that the result ``name`` stores: JSON-ready, without paths of this machine."""
    words = ["mlx_flashhead.convert", "--hf-path", origin.known_as]
    if origin.revision is not None:
        words += ["--revision", origin.revision]
    if not isinstance(options, ConvertOptions):
        words.append("--index-only")
    files = {}
    of_index = {one.name for one in fields(IndexOptions)}
    for one in sorted(fields(options), key=lambda one: one.name in of_index):
        value = getattr(options, one.name)
        if not one.metadata["recipe"] or value == one.default:
            continue
        words.append(flag(one))
        if one.name == "calibration" and options.source == "file":
            file = Path(value).expanduser()
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            words.append(file.name)
        elif callable(value):
            words.append("FUNCTION")  # given in Python
        elif value is not True:
            words.append(str(value))
    words += ["--seed", str(options.seed), "--mlx-path", name]
    versions = {package: version(package) for package in PACKAGES}
    recipe: dict[str, Any] = {
        "name": name,
        "model": origin.known_as,
        "command": shlex.join(words),
        "versions": {"python": platform.python_version(), "mlx_flashhead": __version__} | versions,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if files:
        recipe["files"] = files
    relation = "adapter" if getattr(options, "index_only", True) else "quantized"
    return recipe | {"metadata": card_metadata(origin, relation)}
