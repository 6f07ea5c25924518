"""The estimates of Apple chips: kernels as mlx-lm makes them, sources, and what may be said."""

import csv

import pytest

import kernels
import step_times
from apple_estimates import CHIPS, MODELS
from step_times import chips, gain, models, sampled_gains


@pytest.mark.newest
@pytest.mark.compiled
@pytest.mark.parametrize(
    "architecture, config, dependent, dispatches",
    [
        # Q, k, v and their caches run beside each other.
        ("llama", {}, 12, 17),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}, 21, 37),
        ("qwen3_moe", {"num_experts": 16}, 18, 30),
    ],
)
def test_kernels_of_a_layer(architecture, config, dependent, dispatches):
    counts = []
    for n_layers in (2, 4):
        layers = {"model_type": architecture, "num_hidden_layers": n_layers}
        if "layer_types" in config:
            layers["layer_types"] = config["layer_types"] * (n_layers // 2)
        counts.append(kernels.count(architecture, config | layers))
    more = [after - before for before, after in zip(*counts, strict=True)]
    assert more == [2 * dependent, 2 * dispatches]


@pytest.mark.newest
@pytest.mark.compiled
def test_the_table_has_the_kernels_that_are_counted():
    rows = {row["shape"]: row for row in kernels.rows()}
    for shape in ("lfm2.5-1.2b", "qwen3.5-0.8b"):
        row = rows[shape]
        assert kernels.kernels_of(row) == (int(row["dependent"]), int(row["dispatches"]))


def test_experts_are_read_one_by_one_at_their_own_bits():
    model = models()["gpt-oss-20b"]
    experts = model.experts * 4.25 / 8 / step_times.GATHER
    rest = (model.body - model.experts) * (8 + 0.5) / 8
    assert model.body_bytes(step_times.BYTES[8]) == pytest.approx(rest + experts)


def test_each_public_speed_and_each_model_has_a_source():
    for name in ("speeds", "models"):
        with (step_times.DATA / f"{name}.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                assert row["source"].startswith("https://"), row
    for speed in step_times.rows("speeds"):
        assert speed["model"] in models()
        assert speed["chip"] in chips()


def test_a_multiple_above_two_rests_on_a_16_bit_head_or_on_a_sort():
    for model in MODELS:
        for chip in CHIPS:
            assert max(gain(model, chip, head) for head in (4, 8)) < 2
            greedy = gain(model, chip, 4)
            least, most = sampled_gains(model, chip)
            assert least <= most
            assert most < 2 or greedy < 2


def test_no_step_is_shorter_than_the_host_needs():
    model = models()["smollm2"]
    chip = chips()["m4-max"]
    host = step_times.host_us(model, chip, flash_head=True)
    assert step_times.flash_us(model, chip, 4, 4) >= host
    assert step_times.dense_us(model, chip, 4, 4) >= step_times.host_us(model, chip)


def test_a_softcap_costs_the_dense_side_alone():
    model = models()["gemma-3-4b"]
    chip = chips()["m4"]
    capped = model._replace(softcap=True)
    of = (model, chip, 4, 4)
    capped_of = (capped, chip, 4, 4)
    assert step_times.dense_us(*capped_of) > step_times.dense_us(*of)
    doubts = step_times.DOUBTS * (
        step_times.row_us(capped, chip, 4) - step_times.row_us(model, chip, 4)
    )
    more = step_times.flash_us(*capped_of) - step_times.flash_us(*of)
    assert more == pytest.approx(doubts * (1 + step_times.WASTED["greedy"]))
