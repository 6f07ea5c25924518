"""The recipe of a conversion: the command, versions and files that make the same result again."""

import hashlib
import platform
import shlex
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..models.origin import Origin
from ..version import __version__
from .options import ConvertOptions, IndexOptions

# A recipe has their versions.
PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")

# Options that do not change the result.
NOT_IN_RECIPE = {
    "hf_path",
    "mlx_path",
    "upload_repo",
    "revision",
    "base_model",
    "license",
    "upload",
    "private",
    "overwrite",
    "seed",
}


def make_recipe(options: IndexOptions, origin: Origin, name: str) -> dict[str, Any]:
    """Makes the recipe of a result, JSON-ready, without paths of this machine.

    Args:
        options: The options of the conversion, or of the index alone.
        origin: The model.
        name: The name of the result.
    """
    words = ["mlx_flashhead.convert", "--hf-path", origin.known_as]
    if origin.revision is not None:
        words += ["--revision", origin.revision]
    if not isinstance(options, ConvertOptions):
        words.append("--index-only")
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in NOT_IN_RECIPE or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words.append(_word(field.name, value))
    words += ["--seed", str(options.seed), "--mlx-path", name]
    versions = {"python": platform.python_version(), "mlx_flashhead": __version__}
    versions |= {package: version(package) for package in PACKAGES}
    recipe: dict[str, Any] = {
        "name": name,
        "model": origin.known_as,
        "command": shlex.join(words),
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if options.source == "file":
        text = Path(options.calibration).expanduser()
        recipe["files"] = {text.name: hashlib.sha256(text.read_bytes()).hexdigest()}
    return recipe


def _word(name: str, value: Any) -> str:
    """The value of an option in the command: of a file its name alone, which others have too."""
    if callable(value):
        return "FUNCTION"
    path = Path(str(value)).expanduser()
    if name in ("calibration", "fine_head") and path.exists():
        return path.name
    return str(value)
