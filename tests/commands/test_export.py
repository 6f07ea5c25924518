"""``export``: the file, what is said of it, and its errors."""

import json
from unittest.mock import Mock

import mlx.core as mx
import pytest

from mlx_flashhead.head.plan import METADATA_KEY
from model_folders import contents


@pytest.fixture
def output(tmp_path):
    return tmp_path / "head.safetensors"


def plan_of(file):
    return json.loads(mx.load(str(file), return_metadata=True)[1][METADATA_KEY])


def test_the_file_holds_arrays_and_kernels(run, converted, output):
    code, printed, errors = run("export", "--model", converted, "--output", output)
    assert (code, errors) == (0, "")
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    arrays = mx.load(str(output))
    for name in (str(output), "4 of 17", "metal/swift", "installFlashHead(from: "):
        assert name in printed
    assert arrays["n_probes"].item() == 4
    plan = plan_of(output)
    assert (plan["head"], plan["dtype"]) == ("lm_head", "float32")
    assert plan["rows"]["weight"]["shape"] == [258, 128]
    assert "flash_head::expand" in plan["launches"][plan["logits"][-1]]["source"]


def test_a_full_disk(refused, converted, output, monkeypatch):
    arguments = ("export", "--model", converted, "--output", output)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: Mock(free=1000))
        said = refused(*arguments)
    assert f"{output} needs 0.0 MB, but only 0.0 MB are free there: free some space" in said
    assert "choose another --output" in said
    monkeypatch.setattr(mx, "save_safetensors", Mock(side_effect=RuntimeError("[write] failed")))
    assert f"{output} cannot be written ([write] failed): free some space" in refused(*arguments)
    assert not list(output.parent.iterdir())


def test_a_file_that_is_there_is_kept(refused, run, converted, output, monkeypatch):
    """Also by an export that is interrupted."""
    arguments = ("--model", converted, "--output", output)
    output.write_text("mine")
    said = refused("export", *arguments)
    assert f"{output} exists already" in said and "--overwrite" in said
    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", Mock(side_effect=KeyboardInterrupt))
        assert run("export", *arguments, "--overwrite")[0] == 130
    assert contents(output.parent) == {output.name: b"mine"}
    assert run("export", *arguments, "--overwrite", "--n-probes", 9)[0] == 0
    assert mx.load(str(output))["n_probes"].item() == 9
    score = plan_of(output)["launches"]["flash_head_score"]
    assert score["outputShapes"] == [[1, 9, 16], [1, 9]]
