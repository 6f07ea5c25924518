"""Functions in the place of another package's, before and after it is imported."""

import importlib
import sys

import pytest

from mlx_flashhead.models.compat.imports import put_in_place, when_imported


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
