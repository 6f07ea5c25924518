"""``cache``: what it lists and removes."""

import errno
import json
from pathlib import Path

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
    assert {row[1] for row in rows} == {"owner/One", "Two", "damaged"}
    (one,) = (row for row in rows if row[1] == "owner/One")
    assert one[-4:] == ["4", "of", "26", "–"]


def test_a_narrow_screen_keeps_the_identifiers(run, kept, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, output, _ = run("cache")
    assert all(entry.folder.name[:8] in output for entry in cache.entries())
    assert "…" not in output


@pytest.mark.parametrize("spoil", ["nested", "a link", "a text", "forbidden", "strange"])
def test_a_bad_entry_hides_only_itself(run, kept, tmp_path, monkeypatch, spoil):
    bad = next(entry.folder for entry in cache.entries() if entry.config is None)
    if spoil == "nested":
        (bad / SETTINGS_NAME).write_text("[" * 100_000)
    elif spoil == "a link":
        bad = bad.rename(tmp_path / "elsewhere")
        cache.entries()[0].folder.with_name("link").symlink_to(bad)
    elif spoil == "strange":
        other = next(entry.folder for entry in cache.entries() if entry.config is not None)
        settings = json.loads((other / SETTINGS_NAME).read_text())
        settings["recipe"]["model"], settings["report"] = ["a", 1], {"agreement": "high"}
        (cache.entries()[0].folder.with_name("strange")).mkdir()
        (other.with_name("strange") / SETTINGS_NAME).write_text(json.dumps(settings))
    elif spoil == "a text":
        bad.rename(bad.with_name("old"))
        bad.write_text("")
    else:
        iterdir = Path.iterdir

        def refuse(folder):
            if folder == bad:
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return iterdir(folder)

        monkeypatch.setattr(Path, "iterdir", refuse)
    code, output, _ = run("cache")
    assert code == 0 and "owner/One" in output and "Two" in output and "damaged" in output
    monkeypatch.undo()
    for entry in cache.entries():
        cache.remove(entry)
    assert cache.entries() == [] and (spoil != "a link" or bad.exists())


def test_a_home_that_cannot_be(refused, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", "~nosuchuser/x")
    assert "home directory in ~nosuchuser/x is not known" in refused("cache")


def test_names_do_not_control_the_terminal(run, monkeypatch, tmp_path):
    model = tiny_model()
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(tmp_path / "[red]:smile:"))
    index = tiny_index(model, recipe={"model": "[b]One\x1b[2J"})
    cache.keep(index, cache.place_of(find_head(model).rows()))
    output = run("cache")[1].replace("\n", "")
    assert "[red]:smile:" in output and "[b]One[2J" in output and "\x1b" not in output


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
