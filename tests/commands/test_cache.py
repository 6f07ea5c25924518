"""``cache``: what it lists and removes."""

import pytest

from mlx_flashhead.index.files import FILE_NAME, SETTINGS_NAME
from mlx_flashhead.loading import cache
from mlx_flashhead.models.locate import find_head
from tiny_models import tiny_index, tiny_model


@pytest.fixture
def kept(flash_head_home, monkeypatch):
    """Three FlashHeads, of which one is damaged."""
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate(("owner/One", "Two", "Three")):
        model = tiny_model(seed=seed)
        index = tiny_index(model, recipe={"model": name})
        cache.keep(index, cache.place_of(find_head(model).rows()))
    (damaged,) = (e.folder for e in cache.entries() if e.config.recipe["model"] == "Three")
    (damaged / SETTINGS_NAME).write_text("{")


def test_lists_what_is_kept(run, kept, flash_head_home):
    code, output, _ = run("cache")
    assert code == 0 and str(flash_head_home) in output
    rows = [line.split() for line in output.splitlines() if " MB" in line][1:]
    assert {row[0] for row in rows} == {"owner/One", "Two", "damaged"}
    (one,) = (row for row in rows if row[0] == "owner/One")
    assert one[-4:] == ["of", "26", "50.00", "%"]


def test_removes_some(run, refused, kept):
    key = next(e.folder.name for e in cache.entries() if e.config is None)
    code, output, _ = run("cache", "--remove", "owner/One", key[:10])
    assert code == 0
    assert [line.split()[:2] for line in output.splitlines()] == [
        ["Removed", "owner/One"],
        ["Removed", "damaged"],
    ]
    (left,) = cache.entries()
    assert left.config.recipe["model"] == "Two" and (left.folder / FILE_NAME).exists()
    for name in ("Four", ""):
        said = refused("cache", "--remove", "Two", name)
        assert f"No FlashHead of {name!r} is kept" in said
    assert len(cache.entries()) == 1


def test_removes_all(run, kept):
    assert run("cache", "--remove-all")[0] == 0
    code, output, _ = run("cache")
    assert code == 0 and output.startswith("No FlashHead is kept in ")
