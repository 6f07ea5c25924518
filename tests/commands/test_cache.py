"""``cache``: what it lists, removes and builds anew."""

import errno
import itertools
import json
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from mlx_flashhead import load
from mlx_flashhead.conversion import calibration
from mlx_flashhead.decoding.policy import Tuning
from mlx_flashhead.index.files import FILE_NAME, SETTINGS_NAME, read_index
from mlx_flashhead.loading import build_parts
from mlx_flashhead.loading import cached as cache
from mlx_flashhead.models.loading import load_dense
from mlx_flashhead.models.locate import find_head
from model_folders import contents, write_model
from tiny_models import tiny_index, tiny_model

# Such a name must not control the terminal.
STRANGE = "[b]Two\x1b[2J"
SLOW = Tuning(gain=0.9, sampled_gain=0.8, dense_seconds=0.1)
FAST = replace(SLOW, gain=1.5)


def keep(model, **changes):
    """Keeps a FlashHead of a model whose settings have changes."""
    index = tiny_index(model)
    index = replace(index, config=replace(index.config, **changes))
    cache.keep(index, cache.folder_of(find_head(model).rows()))


@pytest.fixture
def kept(flash_head_home, monkeypatch):
    """Three FlashHeads by their models' names, of which the last one is damaged."""
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate(("owner/One", STRANGE, "Three")):
        keep(tiny_model(seed=seed), recipe={"model": name})
    kept = {entry.model: entry for entry in cache.entries()}
    (kept["Three"].path / SETTINGS_NAME).write_text("{")
    return kept


def test_lists_the_cache(run, kept, flash_head_home, monkeypatch):
    speeds = {"a": asdict(SLOW), "b": asdict(FAST), "c": asdict(FAST)}
    speeds["d"] = asdict(replace(FAST, busy=True))
    place = cache.speeds_of(kept[STRANGE].config)
    place.parent.mkdir()
    place.write_text(json.dumps(speeds))
    code, output, _ = run("cache")
    assert code == 0 and str(flash_head_home) in output
    rows = [line.split(maxsplit=5) for line in re.findall(r"^ *[0-9a-f]{8} .*", output, re.M)]
    by_model = {row[1]: " ".join(row[5:]).strip() for row in rows}
    measured = "0.90 x (dense), 1.50 x, not known yet (dense, since the machine was busy)"
    assert by_model == {"owner/One": "–", "[b]Two[2J": measured, "damaged": "–"}
    place.write_text(json.dumps({"a": asdict(SLOW), "b": asdict(FAST)}))
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run("cache")[1].splitlines()[1:])) <= 80
    monkeypatch.setenv("COLUMNS", "40")
    _, narrow, _ = run("cache")
    assert all(entry.path.name[:8] in narrow for entry in cache.entries()) and "…" not in narrow


def test_a_bad_entry_hides_only_itself(run, kept, tmp_path, monkeypatch):
    bad = kept["Three"].path
    good = kept["owner/One"].path
    # A file has the name of a folder.
    good.with_name(f"{'0' * 24}-1").write_text("")
    settings = json.loads((good / SETTINGS_NAME).read_text())
    settings["recipe"]["model"] = ["a", 1]
    settings["report"] = {"agreement": "high"}
    for content in ("[" * 100_000, json.dumps(settings)):
        (bad / SETTINGS_NAME).write_text(content)
        code, output, _ = run("cache")
        assert code == 0 and "owner/One" in output and "Two" in output
    elsewhere = bad.rename(tmp_path / "elsewhere")
    bad.symlink_to(elsewhere)
    with monkeypatch.context() as patch:
        denied = PermissionError(errno.EACCES, "Permission denied")
        patch.setattr(Path, "iterdir", Mock(side_effect=denied))
        code, output, _ = run("cache")
        assert code == 0 and "owner/One" in output and "Two" in output
    for entry in cache.entries():
        entry.remove()
    assert cache.entries() == [] and (elsewhere / FILE_NAME).exists()


def test_removes_some_and_then_all(run, refused, kept, monkeypatch):
    _, output, _ = run("cache", "--remove", "owner/One", kept["Three"].path.name[:10])
    removed = [line.split()[:2] for line in output.splitlines()]
    assert removed == [["Removed", "owner/One"], ["Removed", "damaged"]]
    (left,) = cache.entries()
    assert left.model == STRANGE and (left.path / FILE_NAME).exists()
    for name in ("Four", ""):
        said = refused("cache", "--remove", STRANGE, name)
        assert f"No FlashHead of {name!r} is kept" in said
    assert len(cache.entries()) == 1
    assert run("cache", "--remove-all")[0] == 0
    code, output, _ = run("cache")
    assert code == 0 and output.startswith("No FlashHead is kept in ")
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", "~nosuchuser/x")
    assert "home directory in ~nosuchuser/x is not known" in refused("cache")


def test_what_is_not_its_own_stays(run, kept, flash_head_home):
    """Folders and files of other names, and other files within its own folders."""
    own = [entry.path for entry in cache.entries()]
    key = own[1].name[:24]
    names = [
        "flash_heads/thesis/text.md",
        "fine_heads/weights.safetensors",
        "speeds/mine.json",
        "notes.txt",
        f"flash_heads/{own[0].name}/mine.txt",
        "flash_heads/abc-1/x",
        f"fine_heads/.{own[0].name}.part",
    ]
    gone = [f"fine_heads/{key}-8.safetensors", f"speeds/{key}.json"]
    for name in [*names, *gone]:
        (flash_head_home / name).parent.mkdir(exist_ok=True, parents=True)
        (flash_head_home / name).write_text("x")
    code, output, _ = run("cache")
    assert code == 0 and "damaged, head of 8 bits" in " ".join(output.split())
    code, output, _ = run("cache", "--remove-all")
    assert code == 0 and output.count("Removed") == 4
    left = {path for path in flash_head_home.rglob("*") if path.is_file()}
    assert {str(path.relative_to(flash_head_home)) for path in left} == set(names)
    for name in ("thesis", "weights.safetensors", "mine.json", "abc-1"):
        assert any(line.startswith("Left") and name in line for line in output.splitlines())
    assert output.count("but other files in it") == 1 and own[0].name in output
    assert cache.entries() == []


@pytest.fixture
def cut_short(tmp_path, quick, monkeypatch):
    """A model, ``(its folder, the entry of its FlashHead)``, whose build was cut short."""
    model = write_model(tmp_path / "Some-Model")
    calibration = {"source": "builtin", "positions": 9, "cut_short": True}
    keep(load_dense(model)[0], calibration=calibration, recipe={"model": model.name})
    monkeypatch.chdir(model.parent)
    (entry,) = cache.entries()
    return model, entry


def test_speeds_are_measured_now(run, cut_short, monkeypatch):
    model, entry = cut_short
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    gains = iter((1.21, 1.22, 1.23))

    def tune(*_):
        yield
        return replace(FAST, gain=next(gains))

    monkeypatch.setattr("mlx_flashhead.loading.tuned.tune", tune)
    monkeypatch.setattr("mlx_flashhead.loading.tuned.is_busy", lambda: False)
    for gain, name in ("1.21", []), ("1.22", [entry.path.name[:6]]), ("1.23", [model]):
        code, output, errors = run("cache", "--measure", *name)
        assert code == 0 and f"{gain} x" in output and "Measuring" in errors
    run("cache", "--remove", model.name)
    assert not cache.speeds_of(entry.config).exists()


def test_an_index_that_is_cut_short_says_how_to_build_it_anew(tmp_path, monkeypatch, capsys):
    options = {"calibration_positions": 300, "calibration_seconds": 1e-6}
    monkeypatch.setattr(build_parts, "IndexOptions", partial(build_parts.IndexOptions, **options))
    # The text is read a window at a time.
    monkeypatch.setattr(calibration, "READ_TOKENS", 64)
    load(str(write_model(tmp_path / "model")))
    errors = capsys.readouterr().err
    assert "This machine was busy, so the build was cut short, after " in errors
    assert "mlx_flashhead.cache --rebuild MODEL makes a faster one." in errors
    assert cache.entries()[0].config.calibration["cut_short"]


@pytest.mark.parametrize("by_name", [True, False])
def test_an_index_that_was_cut_short_is_built_anew(run, cut_short, by_name):
    model, entry = cut_short
    assert "cut short" in run("cache")[1].replace("\n", "")
    speeds = cache.speeds_of(entry.config)
    speeds.parent.mkdir()
    speeds.write_text("{}")
    if by_name:
        name = model.name
    else:
        name = entry.path.name[:8]
    code, output, errors = run("cache", "--rebuild", name)
    assert (code, output) == (0, "")
    assert "Building the FlashHead of Some-Model" in errors and "100%" in errors
    assert "cut short" not in errors and "FlashHead is ready" in errors
    after = read_index(entry.path).config.calibration
    assert "cut_short" not in after and after["positions"] > 9 and not speeds.exists()
    assert [*entry.path.parent.iterdir()] == [entry.path]


def test_ctrl_c_keeps_the_old_index(run, cut_short, monkeypatch):
    model, entry = cut_short
    before = contents(entry.path)
    steps = build_parts.model_index

    def stopped(*arguments, **options):
        yield from itertools.islice(steps(*arguments, **options), 20)
        raise KeyboardInterrupt

    monkeypatch.setattr(build_parts, "model_index", stopped)
    code, _, errors = run("cache", "--rebuild", model)
    assert code == 130 and errors.endswith("Interrupted.\n")
    assert contents(entry.path) == before
    # Nothing is locked.
    assert load(str(model), progress=False)


def test_a_missing_index_is_built_once(run, refused, tmp_path, quick):
    model = write_model(tmp_path / "Some-Model")
    code, output, errors = run("cache", "--build", model)
    assert (code, output) == (0, "") and "FlashHead is ready" in errors
    (entry,) = cache.entries()
    before = contents(entry.path)
    code, output, errors = run("cache", "--build", model)
    assert code == 0 and f"is kept in {entry.path} already" in output and "Building" not in errors
    assert contents(entry.path) == before
    shutil.copytree(entry.path, model, dirs_exist_ok=True)
    assert "has a FlashHead of its own" in refused("cache", "--build", model)


def test_where_nothing_can_be_kept_nothing_is_built(refused, tmp_path, monkeypatch):
    model = write_model(tmp_path / "Some-Model")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_FLASHHEAD_HOME", str(tmp_path / "file" / "home"))
    said = refused("cache", "--build", model)
    assert "cannot be written (Not a directory): set MLX_FLASHHEAD_HOME to another place." in said
    assert "Building" not in said


def test_a_build_that_is_not_kept_is_an_error(run, tmp_path, quick, monkeypatch):
    model = write_model(tmp_path / "Some-Model")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(cache, "keep", Mock(side_effect=full))
    code, _, errors = run("cache", "--build", model)
    assert code == 2 and "It is not kept, since" in errors


def test_models_that_cannot_be_built_anew(refused, cut_short):
    model, entry = cut_short
    before = contents(entry.path)
    assert "There is no folder 'fffff' here" in refused("cache", "--rebuild", "fffff")
    shutil.copytree(entry.path, model, dirs_exist_ok=True)
    assert "has a FlashHead of its own" in refused("cache", "--rebuild", model)
    shutil.rmtree(model)
    for name in (entry.path.name, model.name):
        assert "There is no folder 'Some-Model' here" in refused("cache", "--rebuild", name)
    assert contents(entry.path) == before
