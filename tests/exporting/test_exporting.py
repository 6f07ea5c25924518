"""Exported heads: read again by MLX, they give what the head gives."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.exporting.functions import (
    FUNCTIONS,
    ONLY_FULL_LOGITS,
    export_head,
    head_dtype,
    head_weights,
)
from mlx_flashhead.exporting.mlxfn import rewrite_for
from mlx_flashhead.head import kernel_text
from mlx_flashhead.head.flash_head import FlashHead
from tiny_models import fitted, random_clusters, random_rows, tiny_model

HIDDEN_SIZE = 64
N_PROBES = 9
FORMS = {
    "float32": {},
    "bias": {"bias": True},
    "bfloat16": {"dtype": mx.bfloat16},
    "4 bits": {"bits": 4},
    "mxfp4": {"bits": 4, "mode": "mxfp4"},
    "3 bits": {"bits": 3},
}
KERNEL_FORMS = [form for form in FORMS if form != "3 bits"]
# How a primitive begins in the file: index, kind (1: GPU) and number of the device; its name.
ON_GPU = re.compile(rb"(?s)\x01\0\0\0\0\0\0\0(\x0c\0{7}CustomKernel)")


def make_head(form="float32", vocab_size=203):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, vocab_size, HIDDEN_SIZE, **FORMS[form])
    token_ids = random_clusters(rng, vocab_size, 16)
    return FlashHead(rows, token_ids, fitted(rows, token_ids), n_probes=N_PROBES, backend="mlx")


def hidden_state(dtype, seed=0):
    state = np.random.default_rng(seed).normal(size=(1, HIDDEN_SIZE))
    return mx.array(state.astype(np.float32)).astype(dtype)


def weights_of(head, name):
    weights = head_weights(head.clustered)
    return {k: a for k, a in weights.items() if name == "logits" or k not in ONLY_FULL_LOGITS}


def imported_on_cpu(path):
    """A file of kernels as this machine reads it: it has no GPU to put them on."""
    on_cpu = path.with_name("on_cpu.mlxfn")
    content, n_kernels = ON_GPU.subn(rb"\0\0\0\0\0\0\0\0\1", path.read_bytes())
    on_cpu.write_bytes(content)
    return mx.import_function(str(on_cpu)), n_kernels


def described(arrays):
    return [(tuple(array.shape), array.dtype) for array in arrays]


@pytest.mark.parametrize("include_weights", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_portable_functions_give_what_the_head_gives(tmp_path, form, include_weights):
    head = make_head(form)
    dtype = mx.bfloat16 if form == "bfloat16" else mx.float32
    file = tmp_path / "head.mlxfn"
    functions = export_head(head, file, dtype=dtype, backend="mlx", include_weights=include_weights)
    assert [function.name for function in functions] == list(FUNCTIONS)
    imported = mx.import_function(str(file))
    for seed in (1, 2):
        hidden = hidden_state(dtype, seed)
        found = {}
        for function in functions:
            weights = {} if include_weights else weights_of(head, function.name)
            assert function.inputs.keys() == {function.name, *weights}
            found[function.name] = imported(**{function.name: hidden}, **weights)
            assert described(found[function.name]) == function.outputs
        assert found["token"][0].item() == head.token(hidden).item()
        candidates = [array.reshape(1, -1) for array in found["candidates"]]
        expected = (head(hidden), *head.candidates(hidden))
        for one, other in zip((*found["logits"], *candidates), expected, strict=True):
            assert one.dtype == other.dtype
            assert np.allclose(*(np.array(a.astype(mx.float32)) for a in (one, other)), atol=1e-5)


def test_other_weights_give_another_head(tmp_path):
    head, other = make_head(), make_head()
    other.clustered.rows.weight[:] = -head.clustered.rows.weight
    export_head(head, tmp_path / "head.mlxfn", dtype=mx.float32, backend="mlx")
    imported = mx.import_function(str(tmp_path / "head.mlxfn"))
    hidden = hidden_state(mx.float32)
    for each in (head, other):
        token = imported(token=hidden, **weights_of(each, "token"))[0]
        assert token.item() == each.token(hidden).item()


@pytest.mark.parametrize("n_probes", [1, None, 13])
def test_probes_are_those_asked_for(tmp_path, n_probes):
    head = make_head()
    functions = export_head(
        head, tmp_path / "head.mlxfn", dtype=mx.float32, backend="mlx", n_probes=n_probes
    )
    shape = (1, n_probes or N_PROBES, 16)
    assert functions[1].outputs == [(shape, mx.uint32), (shape, mx.float32)]
    assert head.n_probes == N_PROBES
    with pytest.raises(ValueError, match="choose 1 to 13"):
        export_head(head, tmp_path / "head.mlxfn", dtype=mx.float32, n_probes=14)


@pytest.mark.parametrize("include_weights", [True, False])
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_kernels_are_all_that_runs_and_have_the_same_face(tmp_path, form, include_weights):
    head = make_head(form)
    dtype = mx.bfloat16 if form == "bfloat16" else mx.float32
    file = tmp_path / "head.mlxfn"
    options = {"dtype": dtype, "include_weights": include_weights}
    functions = export_head(head, file, **options)
    assert functions == export_head(head, tmp_path / "portable.mlxfn", backend="mlx", **options)
    imported, n_kernels = imported_on_cpu(file)
    assert n_kernels == 3 * 4
    hidden = hidden_state(dtype)
    for function in functions:
        weights = {} if include_weights else weights_of(head, function.name)
        results = imported(**{function.name: hidden}, **weights)
        assert described(results) == function.outputs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_but_kernels_runs(tmp_path, name):
    file = tmp_path / "head.mlxfn"
    head = make_head()
    export_head(head, file, dtype=mx.float32)
    imported, _ = imported_on_cpu(file)
    operations = []

    def record(entry):
        if entry["type"] == "primitive":
            operations.append(entry["name"])

    arguments = {name: hidden_state(mx.float32)} | weights_of(head, name)
    mx.export_function(record, lambda **arrays: imported(**arrays), **arguments)
    assert operations == ["CustomKernel"] * 4


def test_kernels_for_an_older_mlx_lack_what_it_does_not_know(tmp_path):
    head = make_head()
    for include_weights in (True, False):
        file, older = tmp_path / "head.mlxfn", tmp_path / "older.mlxfn"
        export_head(head, file, dtype=mx.float32, include_weights=include_weights)
        older.write_bytes(file.read_bytes())
        rewrite_for("0.31", older)
        new, old = file.read_bytes(), older.read_bytes()
        n_kernels = len(ON_GPU.findall(new))
        assert len(ON_GPU.findall(old)) == n_kernels == 12
        # the length of no metadata, and an int of each kernel
        assert len(new) - len(old) == 8 + 4 * n_kernels
        head_bytes = len(mx.__version__) + 8 + 4 + 1
        assert old[:head_bytes] == new[:head_bytes]
        assert old[head_bytes:][:200] == new[head_bytes + 8 :][:200]


def test_what_an_older_mlx_cannot_read_is_refused(tmp_path):
    head = make_head()
    file = tmp_path / "head.mlxfn"
    export_head(head, file, dtype=mx.float32, backend="mlx")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="which is not a kernel"):
        rewrite_for("0.31", file)
    assert file.read_bytes() == before
    export_head(head, file, dtype=mx.float32)
    for damaged in (file.read_bytes()[:-1], file.read_bytes() + b"\0", b"\xff" * 99):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not of the form"):
            rewrite_for("0.31", file)
    with pytest.raises(ValueError, match="There is no other form"):
        rewrite_for("0.30", file)


def test_rows_that_the_kernels_do_not_read_are_refused(tmp_path):
    head = make_head("3 bits")
    with pytest.raises(ValueError, match="do not read 3-bit affine rows"):
        export_head(head, tmp_path / "head.mlxfn", dtype=mx.float32)
    export_head(head, tmp_path / "head.mlxfn", dtype=mx.float32, backend="mlx")


def test_fewer_probes_than_the_kernels_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"n_probes is 7, but .* score 8 clusters or more"):
        export_head(make_head(), tmp_path / "head.mlxfn", dtype=mx.float32, n_probes=7)
    export_head(make_head(), tmp_path / "head.mlxfn", dtype=mx.float32, n_probes=8)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_states_have_the_dtype_of_the_model(dtype):
    assert head_dtype(tiny_model(dtype=dtype)) == dtype
    assert head_dtype(tiny_model("qwen3", tied=False, dtype=dtype, bits=4)) == dtype


@pytest.mark.parametrize("name", ["route", "select", "score", "token"])
def test_the_bodies_for_swift_are_those_of_the_kernels(name):
    """With rows of 4 bits and no bias, as the page has them."""
    page = (Path(__file__).parents[2] / "docs" / "ipad.md").read_text(encoding="utf-8")
    rows = "flash_head::affine_rows<D, BITS, GROUP, WORDS>(weight, scales, biases)"
    source = getattr(kernel_text, f"{name.upper()}_BODY")
    if "{rows}" in source:
        source = source.format(rows=rows, bias="flash_head::NoBias{}")
    assert "".join(source.split()) in "".join(page.split())
