"""The estimate for Apple chips, against figures computed by hand."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe

from mlx_flashhead.benchmarks.apple_gpu import bandwidth
from mlx_flashhead.benchmarks.roofline import (
    ModelShape,
    checked_measurements,
    estimates,
    model_shape,
)
from mlx_flashhead.models.locate import find_head
from tiny_models import tiny_index, tiny_model

SMALL = ModelShape(
    name="small",
    vocab_size=1000,
    hidden_size=64,
    n_layers=2,
    layer_kernels=12,
    body_weights=1_000_000,
    n_clusters=100,
    cluster_size=10,
    n_probes=20,
    stage_1_bytes=4000,
)


def by_form(shape, chip):
    return {(e.form, e.body, e.rows): e for e in estimates(shape, chip)}


@pytest.mark.parametrize(
    "rows, head_bytes", [("16-bit", 128_000), ("8-bit", 68_000), ("4-bit", 36_000)]
)
def test_a_small_model_by_hand(rows, head_bytes):
    found = by_form(SMALL, "m1")
    gb_s = 68 * 478 / 614
    launches = (2 * 12 + 5) * 2.75
    body = 562_500 / gb_s / 1000  # µs
    dense, flash = found["dense", "4-bit", rows], found["FlashHead", "4-bit", rows]
    head = (head_bytes + 2000) / gb_s / 1000 + 2.75
    assert dense.head_mb == pytest.approx((head_bytes + 2000) / 1e6)
    assert dense.head_ms == pytest.approx(head / 1000)
    assert dense.model_ms == pytest.approx((body + head + launches) / 1000)
    # centroids and 200 rows, then a 32nd of all rows for the check, and 2 % of steps in vain
    probed = head_bytes / 5
    head = (4000 + probed * 514 / 387) / gb_s / 1000 + 4 * 2.75 + 15
    check = max(2 * 32 * 1000 * 64 / (2.6 * 0.78) / 1e6, head_bytes / gb_s / 1000) / 32
    head += check + 0.02 * (body + launches + head)
    assert flash.head_mb == pytest.approx((4000 + probed + head_bytes / 32) / 1e6)
    assert flash.head_ms == pytest.approx(head / 1000)
    assert flash.model_ms == pytest.approx((body + head + launches) / 1000)


def test_public_measurements_by_hand():
    found = {(m.model, m.chip): rest for m, *rest in checked_measurements()}
    assert len(found) == 9
    measured, estimated, error = found["Llama-3.2-1B", "m5-max"]
    assert measured == pytest.approx(1000 / 537)
    # 16 layers: attention 2048 x (2048 + 512 + 512 + 2048), three matrices of 2048 x 8192
    body = 16 * (2048 * 5120 + 3 * 2048 * 8192) * 0.5625
    head = 128256 * (2048 * 0.5625 + 2)
    assert estimated == pytest.approx((body + head) / 478e6 + (16 * 12 + 1 + 5) * 2.75e-3)
    assert error == pytest.approx(estimated / measured - 1)
    # where plain reads were measured, they count
    measured, estimated, _ = found["Qwen3-0.6B", "m3-ultra"]
    body = 28 * (1024 * 6144 + 3 * 1024 * 3072) * 0.5625
    head = 151936 * (1024 * 0.5625 + 2)
    assert estimated == pytest.approx((body + head) / 514e6 + (28 * 13 + 1 + 5) * 2.75e-3)


@pytest.mark.parametrize("chip", ["m4-ultra", "m5-ultra", "m0", "m6", "", "a18"])
def test_chips_that_do_not_exist(chip):
    sentence = f"Unknown chip '{chip}': choose one of m1, .*, m5-max"
    with pytest.raises(ValueError, match=sentence) as told:
        bandwidth(chip)
    assert f"{chip}," not in str(told.value) or not chip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "arch, layer_kernels, matrices",
    [
        ("llama", 12, 4 * 64 * 64 + 3 * 64 * 128),
        ("qwen3", 13, 4 * 64 * 64 + 3 * 64 * 128),
        ("gemma3_text", 15, 4 * 64 * 64 + 3 * 64 * 128),
        ("gptj", 11, 4 * 64 * 64 + 2 * 64 * 256),  # one norm
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_shape_of_a_model(arch, layer_kernels, matrices, tied, bits):
    kwargs = {} if arch != "llama" else {"num_hidden_layers": 3}
    model = tiny_model(arch, tied=tied, bits=bits, **kwargs)
    shape = model_shape("tiny", model)
    assert (shape.vocab_size, shape.hidden_size) == (203, 64)
    assert shape.n_layers == (3 if arch == "llama" else 1)
    assert shape.layer_kernels == layer_kernels
    assert shape.body_weights == shape.n_layers * matrices
    # everything but the head and the table of embeddings
    outside = ("embed_tokens", "lm_head", "wte")
    parameters = dict(tree_flatten(model.parameters()))
    body = [a.nbytes for name, a in parameters.items() if not any(o in name for o in outside)]
    assert shape.body_bytes == sum(body)
    head = find_head(model).path
    assert shape.head_bytes == sum(
        a.nbytes for name, a in parameters.items() if name.startswith(head + ".")
    )
    assert shape.stored == ("32-bit" if bits is None else "4-bit")
    assert (shape.n_clusters, shape.cluster_size, shape.n_probes) == (13, 16, 13)
    assert shape.stage_1_bytes == 13 * (36 + 4)


def test_a_model_as_it_is_stored():
    """Its own bytes count, those of its FlashHead too."""
    model = tiny_model(bits=8, group_size=32)
    index = tiny_index(model, cluster_size=8, n_probes=5)
    shape = model_shape("tiny", model, index)
    assert (shape.n_clusters, shape.cluster_size, shape.n_probes) == (26, 8, 5)
    centroids = index.centroids
    arrays = (*centroids.matrix.arrays().values(), centroids.bias)
    stage_1 = sum(a.nbytes for a in arrays if a is not None)
    assert shape.stage_1_bytes == stage_1
    row = 64 + 2 * 2 * 4  # 8-bit weights, two groups with float32 scales and offsets
    dense, flash = list(estimates(shape, "m3"))[:2]
    assert (dense.form, dense.body, dense.rows) == ("dense", "as stored", "8-bit")
    assert dense.head_mb == pytest.approx(203 * (row + 2) / 1e6)
    assert flash.head_mb == pytest.approx((stage_1 + 40 * row + 203 * row / 32) / 1e6)
    body = shape.body_bytes / (100 * 478 / 614) / 1e6
    assert dense.model_ms - dense.head_ms == pytest.approx(body + (12 + 5) * 2.75e-3)


def test_probes():
    fewer = SMALL.with_probes(10)
    flash = ("FlashHead", "4-bit", "16-bit")
    difference = by_form(SMALL, "m1")[flash].head_mb - by_form(fewer, "m1")[flash].head_mb
    assert difference == pytest.approx(100 * 128 / 1e6)
    for n_probes in (0, 101):
        with pytest.raises(ValueError, match=f"{n_probes} clusters .* choose 1 to 100"):
            SMALL.with_probes(n_probes)


def test_a_mixture_of_experts_is_refused():
    model = qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            hidden_size=64,
            num_hidden_layers=1,
            intermediate_size=64,
            num_attention_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=32,
            rms_norm_eps=1e-5,
            vocab_size=203,
            num_key_value_heads=2,
            head_dim=32,
            rope_theta=1e4,
            tie_word_embeddings=True,
            max_position_embeddings=128,
            norm_topk_prob=True,
        )
    )
    with pytest.raises(ValueError, match=r"is a mixture of experts.* for dense models"):
        model_shape("moe", model)


def test_a_model_larger_than_memory():
    """Shapes suffice: a fresh model's weights are not there until they are asked for."""
    sizes = {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 200}
    config = {"num_attention_heads": 64, "num_key_value_heads": 64, "rms_norm_eps": 1e-5}
    args = llama.ModelArgs(model_type="llama", vocab_size=500_000, **sizes, **config)
    shape = model_shape("large", llama.Model(args))
    assert shape.body_weights == 200 * (4 * 8192**2 + 3 * 8192 * 65536)
    assert shape.body_bytes == 4 * (shape.body_weights + 401 * 8192)
    assert mx.get_active_memory() < 1e9
