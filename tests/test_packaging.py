"""What a user installs: the wheel of this checkout, in a folder of its own."""

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parent.parent
KERNELS = CHECKOUT / "metal" / "flash_head.metal"


def run(*arguments, **options):
    """Standard output of a Python process that must succeed."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build_wheel(source, folder):
    """Builds the wheel of a checkout or an sdist as pip does, with the backend installed here."""
    run(
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from this checkout."""
    return build_wheel(CHECKOUT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed into, apart from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel):
    """The fields of the wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def python(installed, code):
    """Output of ``code`` where ``mlx_flashhead`` can only come from ``installed``."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return run("-c", code, cwd=installed, env=environment)


def requirements(metadata, platform, machine, extra=""):
    """{name: extras asked for} of what pip would install on a platform."""
    system = {"linux": "Linux", "darwin": "Darwin"}[platform]
    environment = {
        **default_environment(),
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": machine,
        "extra": extra,
    }
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    found = [r for r in found if r.marker is None or r.marker.evaluate(environment)]
    assert len({r.name for r in found}) == len(found)
    return {r.name: r.extras for r in found}


def test_wheel_holds_the_package_and_the_kernels_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("mlx_flashhead/metal/flash_head.metal") == KERNELS.read_bytes()
    modules = {f"mlx_flashhead/{path.name}" for path in (CHECKOUT / "mlx_flashhead").glob("*.py")}
    assert modules <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mlx_flashhead"}


def test_installed_wheel_finds_its_kernels(installed):
    code = (
        "import sys, mlx_flashhead, mlx_flashhead.kernels as kernels\n"
        "print(mlx_flashhead.__file__)\n"
        "sys.stdout.write(kernels.kernel_source())"
    )
    place, _, source = python(installed, code).partition("\n")
    assert Path(place).is_relative_to(installed)
    assert source == KERNELS.read_text()


def test_console_scripts_exist(installed):
    (distribution,) = installed.glob("*.dist-info")
    scripts = [
        entry
        for entry in PathDistribution(distribution).entry_points
        if entry.group == "console_scripts"
    ]
    assert {entry.name for entry in scripts} == {
        "mlx_flashhead.generate",
        "mlx_flashhead.convert",
        "mlx_flashhead.evaluate",
    }
    for entry in scripts:
        code = f"import {entry.module} as module; print(callable(module.{entry.attr}))"
        assert python(installed, code) == "True\n"


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    run("-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=CHECKOUT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    rebuilt = build_wheel(sdist, tmp_path)
    with zipfile.ZipFile(wheel) as expected, zipfile.ZipFile(rebuilt) as found:
        assert set(found.namelist()) == set(expected.namelist())
        for name in expected.namelist():
            assert found.read(name) == expected.read(name)


@pytest.mark.parametrize("extra", ["", "test"])
@pytest.mark.parametrize("platform, machine", [("linux", "x86_64"), ("darwin", "arm64")])
def test_each_platform_gets_the_mlx_that_runs_there(metadata, platform, machine, extra):
    found = requirements(metadata, platform, machine, extra)
    assert found["mlx"] == ({"cpu"} if platform == "linux" else set())
    expected = {"mlx", "mlx-lm", "numpy", "huggingface-hub", "tqdm", "rich", "matplotlib"}
    expected |= {"pytest", "ruff", "hatchling", "ziglang"} if extra else set()
    assert set(found) == expected


def test_metadata(metadata):
    assert metadata["Name"] == "mlx_flashhead"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
