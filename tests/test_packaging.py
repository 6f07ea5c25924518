"""What a user installs: the wheel of this checkout, in a folder of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from mlx_flashhead.__main__ import COMMANDS

CHECKOUT = Path(__file__).parent.parent
KERNELS = sorted((CHECKOUT / "metal" / "flash_head").iterdir())


def output_of(*command, **options):
    """Standard output of a program that must succeed, without this checkout on its path."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def build_wheel(source, folder):
    """Builds the wheel of a checkout or an sdist as pip does, with the backend installed here."""
    flags = ("-q", "--no-deps", "--no-build-isolation")
    output_of(sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", folder, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from this checkout."""
    return build_wheel(CHECKOUT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment that the wheel is installed into; its dependencies are those of this one.

    A line of a .pth file adds a folder, but not what that folder's own .pth files name: an editable
    installation of the checkout is not seen.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    output_of(sys.executable, "-m", "pip", "--python", folder, "install", "-q", "--no-deps", wheel)
    (site_packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


def test_wheel_holds_the_package_and_the_kernels_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        packed = {name for name in names if name.startswith("mlx_flashhead/metal/")}
        assert packed == {f"mlx_flashhead/metal/flash_head/{file.name}" for file in KERNELS}
        for file in KERNELS:
            packed_text = archive.read(f"mlx_flashhead/metal/flash_head/{file.name}")
            assert packed_text == file.read_bytes()
    package = CHECKOUT / "mlx_flashhead"
    page = package / "serving" / "page"
    files = [*package.rglob("*.py"), package / "py.typed", *page.rglob("*.*")]
    files += page.rglob("LICENSE")
    modules = {path.relative_to(CHECKOUT).as_posix() for path in files}
    assert modules <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mlx_flashhead"}


def test_installed_wheel_has_its_commands_and_finds_its_kernels(installed):
    (distribution,) = installed.glob("lib/python*/site-packages/mlx_flashhead-*.dist-info")
    entries = PathDistribution(distribution).entry_points.select(group="console_scripts")
    scripts = {"mlx_flashhead", *(f"mlx_flashhead.{command}" for command in COMMANDS)}
    assert entries.names == scripts
    assert all((installed / "bin" / name).exists() for name in scripts)
    printed = output_of(installed / "bin" / "mlx_flashhead.cache", "--help", cwd=installed)
    assert printed.startswith("usage: mlx_flashhead.cache ")
    code = [f"from {entry.module} import {entry.attr}" for entry in entries]
    code += ["import mlx_flashhead, mlx_flashhead.head.kernel_text as text"]
    code += ["print(mlx_flashhead.__file__)"]
    code += [f"print(text.part({file.stem!r}), end='')" for file in KERNELS]
    found = output_of(installed / "bin" / "python", "-c", "\n".join(code), cwd=installed)
    place, _, source = found.partition("\n")
    assert Path(place).is_relative_to(installed)
    assert source == "".join(file.read_text(encoding="utf-8") for file in KERNELS)


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    output_of(
        sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=CHECKOUT
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    rebuilt = build_wheel(sdist, tmp_path)
    with zipfile.ZipFile(wheel) as expected, zipfile.ZipFile(rebuilt) as found:
        assert set(found.namelist()) == set(expected.namelist())
        for name in expected.namelist():
            assert found.read(name) == expected.read(name)
