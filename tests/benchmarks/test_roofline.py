"""The estimate for Apple chips, against figures computed by hand."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from architecture_models import tiny_architecture
from figures import fit_macs, speed_tables
from mlx_flashhead.benchmarks import roofline
from mlx_flashhead.benchmarks.roofline import CHIPS, SPEEDS, estimates, public_speeds
from mlx_flashhead.benchmarks.shapes import ModelShape, model_shape
from mlx_flashhead.models.locate import find_head
from tiny_models import CONFIGS, tiny_index, tiny_model

SMALL = ModelShape(
    name="small",
    vocab_size=1000,
    hidden_size=64,
    n_layers=2,
    layer_kernels=12,
    body_weights=1_000_000,
    tied=True,
    n_clusters=100,
    cluster_size=10,
    n_probes=20,
    centroid_bytes=4000,
)
M1_GB_S = 68 * roofline.BANDWIDTH_SHARE


def by_form(shape, chip):
    return {(e.form, e.body, e.rows): e for e in estimates(shape, CHIPS[chip])}


@pytest.mark.parametrize(
    "rows, head_bytes", [("16-bit", 128_000), ("8-bit", 68_000), ("4-bit", 36_000)]
)
def test_a_small_model_by_hand(rows, head_bytes):
    forms = by_form(SMALL, "m1")
    launch = roofline.OLD_LAUNCH_US
    body = 562_500 / M1_GB_S / 1000 + (2 * 12 + 2) * launch  # µs
    dense, flash = forms["dense", "4-bit", rows], forms["FlashHead", "4-bit", rows]
    head = (head_bytes + 2000) / M1_GB_S / 1000 + 4 * launch
    assert dense.head_mb == pytest.approx((head_bytes + 2000) / 1e6)
    assert dense.head_ms == pytest.approx(head / 1000)
    assert dense.model_ms == pytest.approx((body + head) / 1000)
    # centroids and 200 rows in five kernels, the embedding's slot among them; one threadgroup reads
    # 100 scores and 20 bests
    probed = head_bytes / 5
    head = (4000 + probed * 514 / 387) / M1_GB_S / 1000 + 5 * launch + 480 / 12_000 + 8
    # a 32nd of a check: all rows once, 32 rows of logits five times, 20 kernels
    check = max(2 * 32 * 1000 * 64 / (2.6 * 0.78) / 1e6, head_bytes / M1_GB_S / 1000)
    head += (check + 5 * 32 * 2000 / M1_GB_S / 1000 + 20 * launch) / 32
    head += 0.02 * (body + head)
    read = 4000 + probed + head_bytes / 32 + 5 * 2000
    assert flash.head_mb == pytest.approx(read / 1e6)
    assert flash.head_ms == pytest.approx(head / 1000)
    assert flash.model_ms == pytest.approx((body + head) / 1000)


def test_a_public_speed_by_hand():
    speeds = list(public_speeds())
    # 16 layers: attention 2048 x (2048 + 512 + 512 + 2048), three matrices of 2048 x 8192
    read = (16 * (2048 * 5120 + 3 * 2048 * 8192) + 128256 * 2048) * 0.5625 + 2 * 128256
    ms = read / (614 * roofline.BANDWIDTH_SHARE) / 1e6
    ms += (16 * 12 + 6) * roofline.LAUNCH_US / 1000
    (speed,) = (s for s in speeds if s["tokens_per_second"] == 578.64)
    key = (speed["chip"], speed["model"], speed["bits"], speed["context"])
    assert key == ("m5-max", "llama-3.2-1b", 4, 0)
    assert speed["estimated_ms"] == pytest.approx(ms)
    assert speed["error"] == pytest.approx(ms / (1000 / 578.64) - 1)
    # with a long context the keys and values of all layers are read too, in 16 bits
    read = (36 * (2560 * 128 * 2 * 40 + 3 * 2560 * 9728) + 151936 * 2560) * 0.5625 + 2 * 151936
    read += 2 * 36 * 8 * 128 * 2 * 2112
    ms = read / (546 * roofline.BANDWIDTH_SHARE) / 1e6
    ms += (36 * 13 + 6) * roofline.LAUNCH_US / 1000
    group_64, group_32 = sorted(
        speed["estimated_ms"]
        for speed in speeds
        if (speed["chip"], speed["model"], speed["bits"]) == ("m4-max", "qwen3-4b", 4)
    )
    assert group_64 == pytest.approx(ms) and group_32 > group_64


def test_the_constants_are_those_that_fit_the_public_speeds():
    for name, value in fit_macs.fitted_constants(SPEEDS).items():
        assert getattr(roofline, name) == pytest.approx(value, rel=5e-3), name


@pytest.mark.parametrize("whole_chip", [False, True])
def test_speeds_that_are_left_out_are_estimated(whole_chip):
    errors = abs(fit_macs.errors_without(SPEEDS, whole_chip=whole_chip))
    assert len(SPEEDS) >= 20
    assert sorted(errors)[len(errors) // 2] <= 0.15


def test_the_page_has_today_s_tables():
    page = speed_tables.PAGE.read_text(encoding="utf-8")
    assert speed_tables.with_tables(page) == page
    assert "| dense |" in page  # where it does not pay


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "arch, layer_kernels, feed_forward",
    [
        ("llama", 12, 3 * 64 * 128),
        ("qwen3", 13, 3 * 64 * 128),
        ("gemma3_text", 20, 3 * 64 * 128),  # each norm adds one to its weight
        ("gptj", 11, 2 * 64 * 256),  # one norm
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_shape_of_a_model(arch, layer_kernels, feed_forward, tied, bits):
    n_layers = 3 if arch == "llama" else 1
    more = {"num_hidden_layers": 3} if arch == "llama" else {}
    model = tiny_model(arch, tied=tied, bits=bits, **more)
    # everything but the head and the table of embeddings
    outside = ("embed_tokens", "lm_head", "wte")
    sizes = {name: array.nbytes for name, array in tree_flatten(model.parameters())}
    head = find_head(model)
    assert model_shape("tiny", model) == ModelShape(
        name="tiny",
        vocab_size=203,
        hidden_size=64,
        n_layers=n_layers,
        layer_kernels=layer_kernels,
        body_weights=n_layers * (4 * 64 * 64 + feed_forward),
        tied=head.tied,
        n_clusters=13,
        cluster_size=16,
        n_probes=13,
        centroid_bytes=13 * (36 + 4),
        body_bytes=sum(n for name, n in sizes.items() if not any(o in name for o in outside)),
        head_bytes=sum(n for name, n in sizes.items() if name.startswith(head.path + ".")),
        stored="32-bit" if bits is None else "4-bit",
    )


def test_a_model_as_it_is_stored():
    """Its own bytes count, those of its FlashHead too."""
    model = tiny_model(bits=8, group_size=32)
    index = tiny_index(model, cluster_size=8, n_probes=5)
    shape = model_shape("tiny", model, index)
    assert (shape.n_clusters, shape.cluster_size, shape.n_probes) == (26, 8, 5)
    centroids = index.centroids
    arrays = (*centroids.matrix.arrays().values(), centroids.bias)
    stage_1 = sum(a.nbytes for a in arrays if a is not None)
    assert shape.centroid_bytes == stage_1
    row = 64 + 2 * 2 * 4  # 8-bit weights, two groups with float32 scales and offsets
    dense, flash = list(estimates(shape, CHIPS["m3"]))[:2]
    assert (dense.form, dense.body, dense.rows) == ("dense", "as stored", "8-bit")
    assert dense.head_mb == pytest.approx(203 * (row + 2) / 1e6)
    assert flash.head_mb == pytest.approx((stage_1 + 40 * row + 203 * row / 32 + 2030) / 1e6)
    body = shape.body_bytes / (100 * roofline.BANDWIDTH_SHARE) / 1e6
    launches = (12 + 2) * roofline.LAUNCH_US / 1000
    assert dense.model_ms - dense.head_ms == pytest.approx(body + launches)


def test_probes():
    key = ("FlashHead", "4-bit", "16-bit")
    all_mb, half_mb = (by_form(s, "m1")[key].head_mb for s in (SMALL, SMALL.with_probes(10)))
    assert all_mb - half_mb == pytest.approx(100 * 128 / 1e6)


def test_a_mixture_of_experts_is_refused():
    model = tiny_architecture("qwen3_moe", tied=True)
    with pytest.raises(ValueError, match=r"is a mixture of experts.* for dense models"):
        model_shape("moe", model)


def test_a_model_larger_than_memory():
    """Shapes suffice: a fresh model's weights are not there until they are asked for."""
    sizes = {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 200}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64}
    config = CONFIGS["llama"] | sizes | heads | {"vocab_size": 500_000}
    model = llama.Model(llama.ModelArgs(model_type="llama", **config))
    shape = model_shape("large", model)
    assert shape.body_weights == 200 * (4 * 8192**2 + 3 * 8192 * 65536)
    assert shape.body_bytes == 4 * (shape.body_weights + 401 * 8192)
    assert mx.get_active_memory() < 1e9
