"""A folder that is there completely or not at all, and conversions that are cut short."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_flashhead.common.new_folder import new_file, new_folder
from mlx_flashhead.conversion import pipeline as conversion
from mlx_flashhead.conversion.pipeline import convert
from model_folders import snapshot


def convert_quickly(dense, target):
    return convert(str(dense), str(target), overwrite=True, calibration="none", progress=False)


@pytest.mark.parametrize("replaces", [False, True])
def test_appears_at_the_end(tmp_path, replaces):
    target = tmp_path / "deep" / "model"
    if replaces:
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")
    before = snapshot(target)
    with new_folder(target) as folder:
        (folder / "weights").write_bytes(b"new")
        assert folder.parent.parent == target.parent
        assert snapshot(target) == before
    assert snapshot(target) == {Path("weights"): b"new"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    # Others can read it.
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_errors_name_the_place(tmp_path, new):
    target = tmp_path / "place"
    with pytest.raises(OSError) as error, new(target) as temporary:
        raise OSError(errno.ENOSPC, "No space left", str(temporary / "weights"))
    assert error.value.filename == str(target)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_replaced_folder_comes_back(tmp_path, monkeypatch, failing):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    replace = os.replace
    calls = itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == failing:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("file", ["model.safetensors", "flash_head.index"])
def test_full_disk_under_mlx(dense, converted, tmp_path, monkeypatch, file):
    """MLX does not raise an OSError then."""
    save = conversion.mlx_lm.save

    def save_to_full_disk(folder, *arguments, **options):
        (folder / file).symlink_to("/dev/full")
        save(folder, *arguments, **options)

    shutil.copytree(converted, tmp_path / "model")
    before = snapshot(tmp_path)
    monkeypatch.setattr(conversion.mlx_lm, "save", save_to_full_disk)
    with pytest.raises(OSError, match=r"free some space or choose another|No space left on device"):
        convert_quickly(dense, tmp_path / "model")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["to_mother.txt", "config.json"])
def test_only_folders_of_a_conversion_are_overwritten(dense, tmp_path, name):
    """A slip of the hand such as ``--mlx-path ~ --overwrite`` deletes nothing, nor a model."""
    (tmp_path / name).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"was not written by mlx_flashhead\.convert"):
        convert_quickly(dense, tmp_path)
    assert snapshot(tmp_path) == before


def test_signal_to_a_real_conversion(dense, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    before = snapshot(tmp_path)
    command = [sys.executable, "-u", "-m", "mlx_flashhead.convert", "--overwrite"]
    command += ["--model", str(dense), "--mlx-path", str(tmp_path / "model")]
    command += ["--calibration-positions", "100000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        seen = b""
        # When the bar has moved, the conversion is well under way.
        while seen.count(b"%|") < 2:
            part = os.read(process.stderr.fileno(), 4096)
            assert part, seen
            seen += part
        assert snapshot(tmp_path) != before
        process.terminate()
        _, rest = process.communicate(timeout=120)
    assert process.returncode == 143, rest
    assert b"Traceback" not in rest
    assert snapshot(tmp_path) == before
