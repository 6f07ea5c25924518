"""``export``: the files, the table, and what is refused."""

import os

import mlx.core as mx
import numpy as np
import pytest

import mlx_flashhead
from mlx_flashhead.exporting.functions import ONLY_FULL_LOGITS

FUNCTIONS = ("token", "candidates", "logits")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "head.mlxfn"


@pytest.fixture
def head(converted):
    model, _ = mlx_flashhead.load(str(converted))
    return mlx_flashhead.get_flash_head(model)


def hidden_state(head):
    state = np.random.default_rng(0).normal(size=(1, head.hidden_size))
    return mx.array(state.astype(np.float32))


def test_the_weights_lie_beside_the_functions(run, converted, output, head):
    code, printed, errors = run(
        "export", "--model", converted, "--output", output, "--backend", "mlx"
    )
    assert (code, errors) == (0, "")
    beside = output.with_suffix(".safetensors")
    assert {file.name for file in output.parent.iterdir()} == {output.name, beside.name}
    weights = mx.load(str(beside))
    for name in (*FUNCTIONS, *weights, str(output), str(beside), "(1, 128)", "float32", "4 of 17"):
        assert name in printed
    imported = mx.import_function(str(output))
    hidden = hidden_state(head)
    (logits,) = imported(logits=hidden, **weights)
    assert mx.allclose(logits, head(hidden), atol=1e-5)
    for name in ONLY_FULL_LOGITS:
        del weights[name]
    assert imported(token=hidden, **weights)[0].item() == head.token(hidden).item()


def test_the_weights_may_be_inside(run, converted, output, head):
    arguments = ("--model", converted, "--output", output, "--include-weights")
    code, printed, errors = run("export", *arguments, "--backend", "mlx", "--n-probes", 1)
    assert (code, errors) == (0, "")
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    assert "rows_weight" not in printed and "1 of 17" in printed
    hidden = hidden_state(head)
    head.n_probes = 1
    imported = mx.import_function(str(output))
    assert imported(token=hidden)[0].item() == head.token(hidden).item()
    assert imported(candidates=hidden)[1].shape == (1, 1, 16)


def test_kernels_are_the_default(run, converted, output):
    arguments = ("--model", converted, "--output", output, "--n-probes", 8)
    code, printed, errors = run("export", *arguments)
    assert (code, errors) == (0, "")
    assert "metal" in printed and "0.32.1 or later" in printed and "docs/ipad.md" in printed
    content = output.read_bytes()
    assert content.count(b"\x0c\0\0\0\0\0\0\0CustomKernel") == 12
    assert b"flash_head::greedy_token" in content
    code, printed, errors = run("export", *arguments, "--for-mlx", "0.31", "--overwrite")
    assert (code, errors) == (0, "") and "its MLX must be 0.31" in printed
    assert len(output.read_bytes()) == len(content) - 8 - 12 * 4


def test_files_that_are_there_are_kept(refused, run, converted, output):
    arguments = ("--model", converted, "--output", output, "--backend", "mlx")
    beside = output.with_suffix(".safetensors")
    for file in (output, beside):
        file.write_text("mine")
        said = refused("export", *arguments)
        assert f"{file} exists already" in said and "--overwrite" in said
        assert file.read_text() == "mine"
        file.unlink()
    output.write_text("mine")
    assert run("export", *arguments, "--overwrite")[0] == 0
    assert mx.import_function(str(output))


def test_an_interrupted_export_leaves_nothing(run, converted, output, monkeypatch):
    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", fails)
    arguments = ("--model", converted, "--output", output, "--n-probes", 8)
    assert run("export", *arguments)[0] == 130
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--output", "head.bin"), "must end in .mlxfn"),
        (("--output", "absent/head.mlxfn"), "there is no folder absent"),
        (("--output", "folder.mlxfn"), "is a folder"),
        (("--output", "head.mlxfn", "--n-probes", 18), "1 to 17"),
        (("--output", "head.mlxfn", "--n-probes", 7), "score 8 clusters or more"),
        (("--output", "head.mlxfn", "--for-mlx", "0.31", "--backend", "mlx"), "leave one of them"),
        (("--output", "head.mlxfn", "--for-mlx", "0.30"), "--for-mlx is 0.30: choose 0.31, 0.32"),
        ((), "--output"),
    ],
)
def test_export_refuses_flags(refused, converted, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mlxfn").mkdir()
    assert said in refused("export", "--model", converted, *arguments)
    assert os.listdir() == ["folder.mlxfn"]


def test_export_refuses_models(refused, dense, output):
    said = refused("export", "--model", dense, "--output", output, "--no-build")
    assert "no FlashHead of model yet" in said
    assert "There is no folder" in refused("export", "--model", "./absent", "--output", output)
