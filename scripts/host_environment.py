"""An environment of its own for a program of somebody else, with mlx_flashhead beside it."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
# Run by the environment's Python: what a package asks for here, without some.
REQUIREMENTS = """
import json, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

asked = [Requirement(text) for text in requires(sys.argv[1]) or ()]
here = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
print(json.dumps([
    f"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}{r.specifier}"
    for r in here if canonicalize_name(r.name) not in sys.argv[2:]
]))
"""


@dataclass(frozen=True)
class Package:
    """What is installed for a program.

    Attributes:
        name: Its name on PyPI.
        version: The version that is tested.
        without: Packages that it asks for and that its text does not need: pictures, sound and
            pages, whose wheels for Linux bring gigabytes of CUDA.
        beside: What it runs with, such as its plugin.
    """

    name: str
    version: str
    without: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


class Environment:
    """A virtual environment under ``folder``, made once for a package of one version."""

    def __init__(self, folder: Path, package: Package):
        self.folder = folder / f"{package.name}-{package.version}"
        self.package = package

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Installs the package and this checkout.

        Raises:
            CalledProcessError: Where that cannot be done; the installer's words stand above it.
        """
        stamp = self.folder / ".installed"
        if stamp.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        package = self.package
        requirement = f"{package.name}=={package.version}"
        self._pip("--no-deps", requirement)
        without = [*package.without, package.name]
        words = [str(self.python), "-c", REQUIREMENTS, package.name, *without]
        asked = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
        self._pip("--editable", str(CHECKOUT), *asked, *package.beside)
        stamp.touch()

    def version_of(self, name: str) -> str:
        """The version of an installed package."""
        code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
        words = [str(self.python), "-c", code, name]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    def _pip(self, *words: str) -> None:
        """Installs with uv, which is faster, or with pip where there is no uv."""
        uv = shutil.which("uv")
        if uv is not None:
            command = [uv, "pip", "install", "--quiet", "--python", str(self.python)]
        else:
            options = ["--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
            command = [str(self.python), "-m", "pip", "install", *options]
        subprocess.run([*command, *words], check=True)
