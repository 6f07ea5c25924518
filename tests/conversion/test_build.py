"""A build in steps: the same index, dropped at any point without a trace."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.conversion.build import IndexBuild, cut_short
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.models.locate import find_head
from model_folders import write_model

OPTIONS = IndexOptions(quick=True, calibration_positions=200)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model, tokenizer = mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "m")))
    return model, tokenizer, find_head(model)


def text_of(loaded):
    return mlx_lm.generate(loaded[0], loaded[1], "One day", max_tokens=8)


def test_text_between_the_steps_is_the_models_and_the_index_is_the_same(loaded):
    expected, key = text_of(loaded), mx.array(mx.random.state[0])
    build = IndexBuild(*loaded, OPTIONS)
    stages, reading = [], []
    for step in build:
        if step.stage not in stages:
            stages.append(step.stage)
            reading.append(build.reads)
            assert text_of(loaded) == expected
        assert 0 <= step.done <= step.total
    assert stages == ["Reading given text", "Clustering", "Fitting", "Rounding", "Measuring"]
    assert reading == [True, False, False, False, False]
    assert mx.array_equal(mx.random.state[0], key)
    at_once = IndexBuild(*loaded, OPTIONS).finish(progress=False)
    assert build.index.config.n_clusters == at_once.config.n_clusters
    assert build.index.config.calibration == {
        "source": "given", "quick": True, "positions": 200, "seed": 0
    }  # fmt: skip
    assert build.index.config.lossless["n_probes"] >= 1


@pytest.mark.parametrize("calibration", ["mix", "given"])
def test_dropped_at_any_step_the_model_is_as_it_was(loaded, calibration):
    before = type(loaded[2].module).__dict__.copy()
    options = IndexOptions(calibration=calibration, calibration_positions=100)
    n_steps = sum(1 for _ in IndexBuild(*loaded, options))
    for taken in np.linspace(0, 0.8 * n_steps, 6).astype(int):  # reading takes some more or less
        build = IndexBuild(*loaded, options)
        for _ in range(taken):
            next(build)
        build.close()
        assert dict(type(loaded[2].module).__dict__) == before
        with pytest.raises(ValueError, match="not built yet"):
            _ = build.index


def test_a_build_that_is_cut_short_says_so(loaded):
    options = IndexOptions(quick=True, calibration_seconds=1e-6)
    index = IndexBuild(*loaded, options).finish(progress=False)
    positions = index.config.calibration["positions"]
    assert index.config.calibration["cut_short"] and positions < 4000
    (sentence,) = cut_short(index.config)
    assert f"cut short by the time limit, after {positions:,} positions" in sentence
    whole = IndexBuild(*loaded, OPTIONS).finish(progress=False)
    assert "cut_short" not in whole.config.calibration and cut_short(whole.config) == []


def test_bars_of_all_stages(loaded, capsys):
    IndexBuild(*loaded, OPTIONS).finish()
    shown = capsys.readouterr()
    for stage in ("Reading given text", "Clustering", "Fitting", "Rounding", "Measuring"):
        assert f"{stage}: 100%" in shown.err
    assert shown.out == ""
