"""What a user installs: the wheel that the sdist of this checkout builds."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from mlx_flashhead.__main__ import COMMANDS

CHECKOUT = Path(__file__).parent.parent
PACKAGE = CHECKOUT / "mlx_flashhead"
KERNELS = sorted((CHECKOUT / "metal" / "flash_head").iterdir())


def output_of(*command, path="", **options):
    """Standard output of this Python, which must succeed, without the checkout on its path."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the sdist, built with the backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "hatchling", "build", "-d", str(folder), "-t")
    output_of(*build, "sdist", cwd=CHECKOUT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    output_of(*build, "wheel", cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_the_kernels_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for file in KERNELS:
            packed_text = archive.read(f"mlx_flashhead/metal/flash_head/{file.name}")
            assert packed_text == file.read_bytes()
        modules = [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]
        for file in [*modules, *(PACKAGE / "serving" / "page").rglob("*.*")]:
            assert archive.read(file.relative_to(CHECKOUT).as_posix()) == file.read_bytes()
    assert sum(name.startswith("mlx_flashhead/metal/") for name in names) == len(KERNELS)
    assert any(name.startswith("mlx_flashhead/serving/") and "LICENSE" in name for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mlx_flashhead"}


def test_the_installed_wheel_has_its_commands_and_finds_its_kernels(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (distribution,) = tmp_path.glob("*.dist-info")
    entries = PathDistribution(distribution).entry_points.select(group="console_scripts")
    assert entries.names == {"mlx_flashhead", *(f"mlx_flashhead.{name}" for name in COMMANDS)}
    code = [f"from {entry.module} import {entry.attr}" for entry in entries]
    code += ["import mlx_flashhead, mlx_flashhead.head.kernels as text"]
    code += ["print(mlx_flashhead.__file__)"]
    code += [f"print(text.part({file.stem!r}), end='')" for file in KERNELS]
    place, _, source = output_of("-c", "\n".join(code), path=tmp_path, cwd=tmp_path).partition("\n")
    assert Path(place).is_relative_to(tmp_path)
    assert source == "".join(file.read_text(encoding="utf-8") for file in KERNELS)
