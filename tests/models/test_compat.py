"""Versions that this project takes, what its import brings along, functions in others' place."""

import importlib
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_flashhead.models.compat import warn_of_later
from mlx_flashhead.models.compat.imports import put_in_place, when_imported

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["mlx", "mlx-lm"])
def test_a_later_version_warns_and_is_not_forbidden(package):
    with pytest.warns(UserWarning, match=f"{package} up to 0.32, and 0.33.1 is installed"):
        warn_of_later(package, "0.33.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_later(package, "0.32.9")
        warn_of_later(package, version(package))


@pytest.mark.newest
def test_a_program_that_loads_imports_no_other_program():
    code = "import mlx_flashhead, sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    modules = set(output.stdout.split())
    assert "mlx_lm" in modules
    assert not modules & {"mlx_lm.chat", "mlx_lm.server", "mlx_lm.evaluate", "rich"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose module ``uses`` takes a function from its module ``defines``."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "defines.py").write_text("def function():\n    return 'original'\n")
    (folder / "uses.py").write_text("from .defines import function\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield "some_package"
    assert sys.meta_path == before  # nobody watches any longer
    for name in [name for name in sys.modules if name.split(".")[0] == "some_package"]:
        del sys.modules[name]


def surround(mark):
    def put(module):
        original = module.function
        put_in_place("some_package", module, "function", lambda: f"{mark} {original()}")

    return put


@pytest.mark.parametrize("imported_first", [True, False])
def test_a_function_is_replaced_wherever_it_is(package, imported_first):
    """Twice, and in the modules that have taken it already as well as in those that will."""
    if imported_first:
        importlib.import_module(f"{package}.uses")
    for mark in ("first", "second"):
        when_imported(f"{package}.defines", surround(mark))
    for name in ("uses", "defines"):
        found = importlib.import_module(f"{package}.{name}").function()
        assert sorted(found.split()) == ["first", "original", "second"]


def test_other_packages_keep_theirs(package):
    """As a user's own module does that has imported the function."""
    defines = importlib.import_module(f"{package}.defines")
    own = defines.function
    surround("changed")(defines)
    assert own() == "original" and defines.function() == "changed original"
