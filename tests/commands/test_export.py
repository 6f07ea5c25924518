"""``export``: the file, the table, and what is refused."""

import os

import mlx.core as mx
import pytest

from plan_replay import read_plan


@pytest.fixture
def output(tmp_path):
    return tmp_path / "head.safetensors"


def plan_of(file):
    return read_plan(file)[1]


def test_the_file_holds_arrays_and_kernels(run, converted, output):
    code, printed, errors = run("export", "--model", converted, "--output", output)
    assert (code, errors) == (0, "")
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    arrays = mx.load(str(output))
    for name in (*arrays, str(output), "(17, 16)", "uint32", "4 of 17", "docs/ipad.md"):
        assert name in printed
    assert arrays["n_probes"].item() == 4
    plan = plan_of(output)
    assert (plan["head"], plan["dtype"]) == ("lm_head", "float32")
    assert plan["rows"]["weight"]["shape"] == [258, 128]
    assert "flash_head::expand" in plan["launches"][plan["logits"][-1]]["source"]


def test_a_file_that_is_there_is_kept(refused, run, converted, output):
    arguments = ("--model", converted, "--output", output)
    output.write_text("mine")
    said = refused("export", *arguments)
    assert f"{output} exists already" in said and "--overwrite" in said
    assert output.read_text() == "mine"
    assert run("export", *arguments, "--overwrite", "--n-probes", 9)[0] == 0
    assert mx.load(str(output))["n_probes"].item() == 9
    score = plan_of(output)["launches"]["flash_head_score"]
    assert score["outputShapes"] == [[1, 9, 16], [1, 9]]


def test_an_interrupted_export_leaves_nothing(run, converted, output, monkeypatch):
    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", fails)
    assert run("export", "--model", converted, "--output", output)[0] == 130
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--output", "head.bin"), "must end in .safetensors"),
        (("--output", "absent/head.safetensors"), "there is no folder absent"),
        (("--output", "folder.safetensors"), "is a folder"),
        (("--output", "head.safetensors", "--n-probes", 18), "1 to 17"),
        (("--output", "head.safetensors", "--model", "./absent"), "There is no folder"),
        ((), "--output"),
    ],
)
def test_export_refuses_flags(refused, converted, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    assert said in refused("export", "--model", converted, *arguments)
    assert os.listdir() == ["folder.safetensors"]


def test_export_refuses_a_place_among_weights(refused, converted):
    """Programs that load every file there would refuse the model."""
    before = sorted(converted.iterdir())
    said = refused("export", "--model", converted, "--output", converted / "head.safetensors")
    assert "lies in a model's folder" in said and "choose another folder" in said
    assert sorted(converted.iterdir()) == before
