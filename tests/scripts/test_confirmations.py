"""What a machine confirms of MLX's kernels and of ours."""

import json

import mlx.core as mx
import numpy as np
import pytest

import confirmations
import host_time
import wide_parts
from confirmations import CountedKernels, products, random_rows, sums
from kernel_cases import kernels, make_clustered, on_gpu
from mlx_flashhead.head.matrix import FORMATS
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.wide import trial


def test_every_format_that_kernels_read_is_summed():
    read = [form for form in FORMATS if form.metal is not None]
    found = list(sums([(64, 64)]))
    assert {figures["format"] for figures in found} == set(map(str, read))
    for figures in found:
        assert 0 <= figures["scored"] <= 1
        if not on_gpu():
            assert figures["dense"] > 0.9 and not figures["equal_expected"]


def test_rows_without_a_whole_group_are_left_out():
    form = next(form for form in FORMATS if str(form) == "4-bit affine")
    assert random_rows(form, 8, 40, mx.float16) is None
    assert random_rows(form, 8, 64, mx.float16).group_size == 64


def test_the_distance_of_products_is_a_share_of_lengths():
    found = list(products([64], sizes=(1, 8)))
    assert [figures["states"] for figures in found] == [1, 8] * 3
    for figures in found:
        largest = 1e-6 if figures["dtype"] == "float32" else 1e-2
        assert figures["distance"] < largest
        if figures["states"] == 1:
            assert figures["distance"] == 0


@pytest.mark.skipif(on_gpu(), reason="pipelines are only limited on the emulator")
def test_compiled_texts_and_allowed_threads_are_counted():
    clustered = make_clustered(np.random.default_rng(0), 20, 8, 64)
    with kernels(check=False, max_threads={"flash_head_route": 448}) as emulator:
        counted = CountedKernels()
        operations = MetalOperations(clustered, counted.metal_kernel)
        for n_positions in (1, 1, 2, 3):
            operations.route(mx.zeros((n_positions, 64), mx.bfloat16))
        # They are of one position and of several.
        assert len(counted.texts) == len(emulator.built) == 2
        assert counted.limits == {}
        counted.measures = True
        operations.route(mx.zeros((1, 64), mx.bfloat16))
        assert counted.limits == {"route": 448}
        assert len(counted.texts) == 2


def test_all_figures_are_in_the_file(run, converted, monkeypatch, tmp_path):
    monkeypatch.setattr(confirmations, "SIZES", [(64, 64)])
    monkeypatch.setattr(confirmations, "WIDTHS", [64])
    monkeypatch.setattr(confirmations, "SMALL", ())
    monkeypatch.setattr(confirmations, "SHAPES", {})
    monkeypatch.setattr(confirmations, "ANSWER", 4)
    monkeypatch.setattr(host_time, "N_TOKENS", 4)
    monkeypatch.setattr(host_time, "FIRST", 2)
    monkeypatch.setattr(wide_parts, "N_TOKENS", 8)
    monkeypatch.setattr(trial, "LONG", (60,))
    file = tmp_path / "out.json"
    code, _, errors = run(confirmations, converted, "--json", file)
    assert code == 0 and "Confirmed: wide" in errors
    found = json.loads(file.read_text())
    names = ["first_token", "kernels", "rounding", "sums", "products", "heads", "host", "wide"]
    assert list(found) == ["kind", "machine", *names]
    assert min(found["first_token"]) > 0
    assert found["host"]["penalty"]["relative"] > 0
    assert all(text["same"] for text in found["wide"]["texts"].values())
    assert all(part["equal"] == part["of"] for part in found["wide"]["parts"]["8"].values())
