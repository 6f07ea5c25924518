"""Attaching a FlashHead to a model that is in memory, from wherever it can be had."""

import errno
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from mlx_flashhead.index.files import FILE_NAME, SETTINGS_NAME, write_companion
from mlx_flashhead.loading import cached as cache
from mlx_flashhead.loading import sources
from mlx_flashhead.loading.head_options import DENSE, HeadOptions
from mlx_flashhead.loading.load import attach, attach_head, load, load_with_head, sharded_load
from mlx_flashhead.models.errors import UnsupportedHeadError
from mlx_flashhead.models.install import detach, get_flash_head
from mlx_flashhead.models.locate import find_head
from model_folders import contents, write_model
from tiny_models import tiny_index, tiny_model

TOKENS = mx.array([[3, 1, 200, 7]])


@pytest.fixture
def folder(tmp_path):
    """A model's folder without a FlashHead."""
    return write_model(tmp_path / "My-Model")


@pytest.fixture
def companion(folder, tmp_path):
    """A folder with the FlashHead of that model alone, of 7 probes."""
    place = tmp_path / "companion"
    place.mkdir()
    write_companion(place, tiny_index(mlx_lm.load(str(folder))[0], n_probes=7))
    return place


def test_first_use_builds_and_the_second_does_not(folder, quick, capfd, flash_head_home):
    model, tokenizer = load(str(folder))
    first = get_flash_head(model)
    output, errors = capfd.readouterr()
    (entry,) = cache.entries()
    assert output == "" and f"It is kept in {entry.path}." in errors
    assert "Building the FlashHead of My-Model, which takes at most about" in errors
    assert "FlashHead is built. Its first steps are tried on this machine" in errors
    assert "FlashHead: 100%" in errors
    assert entry.path.is_relative_to(flash_head_home)
    assert {path.name for path in entry.path.iterdir()} == {FILE_NAME, SETTINGS_NAME}
    again = get_flash_head(load(str(folder))[0])
    assert capfd.readouterr() == ("", "")
    assert mx.array_equal(again.clustered.token_ids, first.clustered.token_ids)
    assert again.n_probes == first.n_probes
    assert mlx_lm.generate(model, tokenizer, "One day", max_tokens=3)


def test_identified_by_the_rows_of_the_model(folder, quick, tmp_path, monkeypatch, capfd):
    """Elsewhere, and in another precision, the nearest one is taken; but none of another recipe."""
    load(str(folder))
    moved = str(shutil.move(folder, tmp_path / "elsewhere"))
    capfd.readouterr()
    load(moved)
    assert capfd.readouterr().err == ""
    load(str(write_model(tmp_path / "other", seed=1)))
    assert "Building the FlashHead of other" in capfd.readouterr().err
    mlx_lm.convert(moved, str(tmp_path / "quantized"), quantize=True)
    capfd.readouterr()
    model, _ = load(str(tmp_path / "quantized"))
    assert "was made from another form of these rows" in capfd.readouterr().err
    assert get_flash_head(model).clustered.rows.bits == 4
    assert len(cache.entries()) == 2
    monkeypatch.setattr(cache, "RECIPE", cache.RECIPE + 1)
    rows = find_head(mlx_lm.load(moved)[0]).rows()
    assert sources.find(rows, pytest.fail) is None and not cache.folder_of(rows).exists()


def test_order_of_the_look_up(folder, companion):
    def probes(**options):
        return get_flash_head(load(str(folder), **options)[0]).n_probes

    model = mlx_lm.load(str(folder))[0]
    cache.keep(tiny_index(model, n_probes=6), cache.folder_of(find_head(model).rows()))
    assert probes() == 6
    write_companion(folder, tiny_index(model, n_probes=5))
    # It is the one in the model's folder.
    assert probes() == 5
    # It is the given one.
    assert probes(flash_head=str(companion)) == 7
    assert probes(flash_head=str(companion), n_probes=3) == 3


def test_attach_and_detach(folder, companion, tmp_path):
    model, tokenizer = mlx_lm.load(str(folder))
    dense = model(TOKENS)
    head = attach(model, tokenizer, companion)
    assert get_flash_head(model) is head and head.n_probes == 7
    with head.settings():
        assert not mx.allclose(model(TOKENS), dense)
    with pytest.raises(ValueError, match="already installed on this model: detach it first"):
        attach(model, tokenizer, companion)
    detach(model)
    assert get_flash_head(model) is None
    assert mx.array_equal(model(TOKENS), dense)


def test_models_of_other_rows_or_in_training_mode_are_refused(folder, companion, tmp_path):
    trained, tokenizer = mlx_lm.load(str(folder))
    other, _ = mlx_lm.load(str(write_model(tmp_path / "other", seed=3)))
    trained.train()
    for model, said in (
        (other, rf"in {companion} belongs to other rows than this"),
        (trained, r"in training mode.*call model\.eval"),
    ):
        before = model(TOKENS)
        with pytest.raises(ValueError, match=said):
            attach(model, tokenizer, str(companion))
        assert get_flash_head(model) is None and mx.array_equal(model(TOKENS), before)


def test_attach_builds_for_a_model_from_anywhere(folder, quick):
    model, tokenizer = mlx_lm.load(str(folder))
    nn.quantize(model, group_size=64, bits=8)
    assert attach(model, tokenizer, progress=False).clustered.rows.bits == 8
    (entry,) = cache.entries()
    recipe = entry.config.recipe
    assert (recipe["model"], recipe["name"]) == ("My-Model", "My-Model-FlashHead")
    assert str(folder.parent) not in json.dumps(entry.config.to_dict())


def test_nothing_is_built_that_was_not_wanted(folder):
    with pytest.raises(
        ValueError, match=r"no FlashHead of My-Model yet, and none is built with `build=False`"
    ):
        load(str(folder), build=False)
    options = HeadOptions(missing=DENSE)
    assert get_flash_head(load_with_head(folder, options)[0]) is None
    with pytest.raises(ValueError, match=r"no FlashHead of My-Model yet"):
        # Several processes build none.
        sharded_load(str(folder))
    assert cache.entries() == []
    model = tiny_model("minicpm")
    with pytest.raises(UnsupportedHeadError, match="cannot be intercepted"):
        attach(model, None)
    assert attach_head(model, None, None, Path("x"), options) is None


def test_a_damaged_entry_is_built_anew(folder, quick, capfd):
    model = mlx_lm.load(str(folder))[0]
    rows = find_head(model).rows()
    index = tiny_index(model)
    place = cache.folder_of(rows)
    file = place / FILE_NAME
    settings = place / SETTINGS_NAME
    cache.keep(index, place)
    good = contents(place)
    absurd = json.loads(good[SETTINGS_NAME])
    risk = {"greedy": [0, 0], "sampled": 1}
    absurd["verification"] = {"risk": risk, "by_probes": [{"n_probes": 10**9}]}
    unread = f"{file} cannot be read because it is damaged or incomplete"
    lacking = f"{settings} is damaged (Object missing required field"
    for changed, reason in (
        ({SETTINGS_NAME: json.dumps(absurd).encode()}, lacking),
        ({FILE_NAME: good[FILE_NAME][:-100]}, unread),
        ({FILE_NAME: b""}, unread),
        ({}, f"{file} does not hold the arrays that its settings describe"),
    ):
        # The index has ids twice, and the checksum that belongs to them.
        if not changed:
            index.token_ids[0, 0] = index.token_ids[1, 0]
            cache.keep(index, place)
            good = contents(place)
        for name, content in (good | changed).items():
            (place / name).write_bytes(content)
        said = []
        assert sources.find(rows, said.append) is None
        (sentence,) = said
        assert sentence.startswith(reason) and sentence.endswith(": it is built again.")
    capfd.readouterr()
    load(str(folder))
    first, second, *_ = capfd.readouterr().err.splitlines()
    assert first == sentence and second.startswith("Building the FlashHead of ")
    load(str(folder))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "owner, name, code",
    [(cache.files, "write_companion", errno.ENOSPC), (Path, "mkdir", errno.EACCES)],
    ids=["full", "no permission"],
)
def test_a_head_that_cannot_be_cached_works_all_the_same(
    folder, quick, monkeypatch, capfd, flash_head_home, owner, name, code
):
    reason = os.strerror(code)
    monkeypatch.setattr(owner, name, Mock(side_effect=OSError(code, reason, str(flash_head_home))))
    model, _ = load(str(folder))
    assert get_flash_head(model) is not None
    errors = capfd.readouterr().err
    said = f"It is not kept, since {flash_head_home} cannot be written ({reason}): set MLX_FLASH"
    assert errors.count(said) == 1
    monkeypatch.undo()
    assert not list(flash_head_home.rglob(".*"))


def test_a_companion_from_the_hub(hub, folder, companion):
    hub.put("maker/Heads", contents(companion) | {"model.safetensors": b"no"})
    model, _ = load(str(folder), flash_head="maker/Heads")
    assert get_flash_head(model).n_probes == 7
    assert not any("model.safetensors" in path for _, path in hub.requests)
    hub.put("maker/Empty", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="holds no FlashHead"):
        load(str(folder), flash_head="maker/Empty")


def test_a_folder_whose_index_was_left_out(converted, quick, tmp_path, capfd):
    """mlx_lm.fuse and mlx_lm.convert write such folders."""
    folder = shutil.copytree(converted, tmp_path / "model")
    (folder / FILE_NAME).unlink()
    assert get_flash_head(load(str(folder))[0]) is not None
    errors = capfd.readouterr().err
    assert f"{folder} names a FlashHead, but {FILE_NAME} is missing" in errors
    assert "Building" in errors
