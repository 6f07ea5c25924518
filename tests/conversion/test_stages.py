"""Conversions that continue from what a killed one had finished."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion import indexing
from mlx_flashhead.conversion import pipeline as conversion
from mlx_flashhead.conversion.pipeline import convert
from mlx_flashhead.conversion.stages import CALIBRATION, CLUSTERS, Stages, array_fingerprint
from mlx_flashhead.index.files import FILE_NAME
from model_folders import write_model

STAGES = {CALIBRATION: (conversion, "generated_states"), CLUSTERS: (indexing, "cluster_rows")}


class Stopped(Exception):
    """What cuts a conversion short."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    """The index of a conversion that went through."""
    target = tmp_path_factory.mktemp("uninterrupted") / "model"
    convert_to(target, source, resume=False)
    return (target / FILE_NAME).read_bytes()


@pytest.fixture
def computed(monkeypatch):
    """The stages that are computed, in order."""
    names = []

    def record(name, original):
        def recorded(*args, **kwargs):
            names.append(name)
            return original(*args, **kwargs)

        return recorded

    for name, (module, function) in STAGES.items():
        monkeypatch.setattr(module, function, record(name, getattr(module, function)))
    return names


def convert_to(target, source, **flags):
    flags = {"calibration_positions": 100, "resume": True, "progress": False, **flags}
    return convert(str(source), str(target), **flags)


def stop_at(monkeypatch, module, function):
    """The next conversion ends where ``function`` is called."""

    def stop(*_, **__):
        raise Stopped

    monkeypatch.setattr(module, function, stop)


@pytest.fixture
def stopped(source, tmp_path, monkeypatch):
    """A target to which a conversion has finished all stages but was cut short."""
    target = tmp_path / "deep" / "model"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, indexing, "fit_centroids")
        convert_to(target, source)
    assert files(tmp_path) == [
        "deep", "deep/.model.stages", "deep/.model.stages/calibration.npz",
        "deep/.model.stages/clusters.npz",
    ]  # fmt: skip
    return target


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_continues_with_both_stages(source, stopped, computed, uninterrupted, capsys):
    convert_to(stopped, source, progress=True)
    assert computed == []
    said = capsys.readouterr().out
    assert "Continuing with the calibration of an earlier run\n" in said
    assert "Continuing with the clusters of an earlier run\n" in said
    assert (stopped / FILE_NAME).read_bytes() == uninterrupted
    assert [path.name for path in stopped.parent.iterdir()] == ["model"]


def test_continues_after_the_first_stage(source, tmp_path, monkeypatch, computed, uninterrupted):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, indexing, "cluster_rows")
        convert_to(tmp_path / "model", source)
    assert files(tmp_path) == [".model.stages", ".model.stages/calibration.npz"]
    computed.clear()
    convert_to(tmp_path / "model", source)
    assert computed == [CLUSTERS]
    assert (tmp_path / "model" / FILE_NAME).read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_between_stages(source, tmp_path, computed, uninterrupted):
    """By a signal that no program can catch, right after the clusters."""
    program = (
        "import os, signal, sys\n"
        "from mlx_flashhead.conversion import indexing\n"
        "from mlx_flashhead.convert import main\n"
        "indexing.fit_centroids = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main()"
    )
    target = tmp_path / "model"
    arguments = ["--model", source, "--mlx-path", target, "--calibration-positions", 100]
    killed = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments), "--resume"],
        env={**os.environ, "PYTHONPATH": str(Path(conversion.__file__).parents[2])},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not target.exists()
    convert_to(target, source)
    assert computed == []
    assert (target / FILE_NAME).read_bytes() == uninterrupted
    assert not (tmp_path / ".model.stages").exists()


@pytest.mark.parametrize(
    "flags, anew",
    [
        ({"n_probes": 3, "target_agreement": 0.5}, []),
        ({"cluster_size": 8}, [CLUSTERS]),
        ({"calibration_positions": 110}, [CALIBRATION, CLUSTERS]),
        ({"calibration": "none"}, [CLUSTERS]),
        ({"seed": 1}, [CALIBRATION, CLUSTERS]),
        ({"head_bits": 8}, [CALIBRATION, CLUSTERS]),
        ({"dtype": "float16"}, [CALIBRATION, CLUSTERS]),
    ],
)
def test_stages_of_other_settings_are_made_anew(
    source, stopped, computed, tmp_path, capsys, flags, anew
):
    convert_to(stopped, source, progress=True, **flags)
    assert computed == anew
    said = capsys.readouterr().out
    for name in STAGES:
        sentence = f"The {name} of an earlier run had another model or settings: made anew\n"
        assert said.count(sentence) == (name in anew)
    fresh = tmp_path / "fresh"
    convert_to(fresh, source, resume=False, **flags)
    assert (stopped / FILE_NAME).read_bytes() == (fresh / FILE_NAME).read_bytes()
    assert not (stopped.parent / ".model.stages").exists()


def test_stages_of_another_body_are_made_anew(stopped, computed, tmp_path):
    """The clusters too: how far apart the head's rows are depends on the states."""
    other = write_model(tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "mlx"})
    convert_to(stopped, other)
    assert computed == [CALIBRATION, CLUSTERS]


def test_stages_of_another_tokenizer_are_made_anew(stopped, computed, tmp_path):
    other = write_model(tmp_path / "other", chat_template="{{ messages[0].content }}")
    convert_to(stopped, other)
    assert computed == [CALIBRATION, CLUSTERS]


def test_stages_of_another_text_are_made_anew(source, stopped, tmp_path, computed, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("One day, a long time ago, a bridge was built. " * 5)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, indexing, "fit_centroids")
        convert_to(stopped, source, calibration=str(text))
    stage = stopped.parent / ".model.stages" / "calibration.npz"
    before = stage.read_bytes()
    text.write_text("Another day, a long time ago, a bridge fell. " * 5)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, indexing, "fit_centroids")
        convert_to(stopped, source, calibration=str(text))
    assert stage.read_bytes() != before
    convert_to(stopped, source, calibration=str(text))
    assert computed == [CLUSTERS, CLUSTERS]  # for each text, and not again


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_damaged_stages_are_made_anew(source, stopped, computed, uninterrupted, content):
    for name in STAGES:
        file = stopped.parent / ".model.stages" / f"{name}.npz"
        file.write_bytes(file.read_bytes()[:-300] if content is None else content)
    convert_to(stopped, source)
    assert computed == [CALIBRATION, CLUSTERS]
    assert (stopped / FILE_NAME).read_bytes() == uninterrupted


def test_kept_stages_are_not_used_without_the_flag(source, stopped, computed, capsys):
    """But named; they last until the conversion has succeeded."""
    with pytest.raises(ValueError, match="n_probes"):
        convert_to(stopped, source, resume=False, n_probes=10_000)
    assert (stopped.parent / ".model.stages" / "clusters.npz").exists()
    convert_to(stopped, source, resume=False, progress=True)
    assert computed == [CALIBRATION, CLUSTERS]
    said = capsys.readouterr().out
    assert "An earlier run left its calibration and clusters: not used without --resume\n" in said
    assert [path.name for path in stopped.parent.iterdir()] == ["model"]


def test_nothing_is_kept_of_what_is_not_finished(source, tmp_path, monkeypatch):
    stop_at(monkeypatch, conversion, "generated_states")
    with pytest.raises(Stopped):
        convert_to(tmp_path / "deep" / "model", source)
    assert files(tmp_path) == []


def test_half_written_stage_is_not_one(tmp_path, monkeypatch):
    stages = Stages(tmp_path / "stages")

    def half_written(sink, **arrays):
        sink.write(b"half")
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(np, "savez", half_written)
        stages.run(CLUSTERS, lambda: "same", lambda: {"token_ids": np.arange(3)})
    assert stages.kept() == []
    stages.run(CLUSTERS, lambda: "same", lambda: {"token_ids": np.arange(4)})
    assert stages.kept() == [CLUSTERS]
    again = Stages(tmp_path / "stages").run(CLUSTERS, lambda: "same", lambda: pytest.fail("made"))
    np.testing.assert_array_equal(again["token_ids"], np.arange(4))
    stages.delete()
    assert files(tmp_path) == []


def test_only_stages_are_deleted(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "letter.txt").write_text("kept")
    stages = Stages(tmp_path / "stages")
    stages.run(CLUSTERS, lambda: "same", lambda: {"token_ids": np.arange(4)})
    stages.delete()
    assert files(tmp_path) == ["stages", "stages/letter.txt"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32])
def test_fingerprint_sees_every_value(dtype):
    values = mx.arange(6).reshape(2, 3).astype(dtype)
    own = array_fingerprint(values)
    assert own == array_fingerprint(values + 0)
    other = mx.array(values)
    other[1, 2] += 1
    assert len({own, array_fingerprint(other), array_fingerprint(values.reshape(3, 2))}) == 3
    assert array_fingerprint(values.astype(mx.float16)) != own
