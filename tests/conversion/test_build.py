"""A build in steps: the same index, dropped or killed at any point without a trace."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_flashhead
from mlx_flashhead.conversion.build import cut_short, model_index
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import build, cache
from mlx_flashhead.models.locate import find_head
from model_folders import write_model

OPTIONS = IndexOptions(quick=True, calibration_positions=200)
STAGES = ["Reading given text", "Clustering", "Fitting", "Rounding", "Measuring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = mlx_lm.load(str(folder))
    return model, tokenizer, find_head(model)


def text_of(loaded):
    return mlx_lm.generate(loaded[0], loaded[1], "One day", max_tokens=8)


def test_text_between_the_steps_is_the_models_and_the_index_is_the_same(loaded):
    expected, key = text_of(loaded), mx.array(mx.random.state[0])
    steps = model_index.steps(*loaded, OPTIONS, step_seconds=0.0)
    stages, sizes = [], []
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            config = end.value.config
            break
        if step.stage not in stages:
            stages.append(step.stage)
            assert text_of(loaded) == expected
        if step.stage == STAGES[0]:
            sizes.append(step.done)
        assert 0 <= step.done <= step.total
    assert stages == STAGES
    assert np.diff([0, *sizes]).max() <= 16
    assert mx.array_equal(mx.random.state[0], key)
    at_once = model_index(*loaded, OPTIONS, progress=False).config
    assert config.n_clusters == at_once.n_clusters
    expected = {"source": "given", "quick": True, "positions": 200, "seed": 0}
    assert config.calibration == at_once.calibration == expected
    assert config.lossless["n_probes"] >= 1


def test_dropped_at_any_step_the_model_is_as_it_was(loaded):
    before = type(loaded[2].module).__dict__.copy()
    options = IndexOptions(calibration_positions=100)
    n_steps = sum(1 for _ in model_index.steps(*loaded, options))
    for taken in np.linspace(0, 0.8 * n_steps, 6).astype(int):  # reading takes some more or less
        steps = model_index.steps(*loaded, options)
        for _ in range(taken):
            next(steps)
        steps.close()
        assert dict(type(loaded[2].module).__dict__) == before


# Loads the model argv[1], whose FlashHead it builds, and kills itself at the moment argv[2].
KILLED = """
import functools, os, signal, sys
from mlx_flashhead import load
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.index import files
from mlx_flashhead.loading import build

def passed(moment):
    if moment == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

def killed_steps(*args, steps=build.model_index.steps, **options):
    for step in steps(*args, **options):
        passed(step.stage)

def killed_write(*args):
    passed("writing")

build.IndexOptions = functools.partial(IndexOptions, calibration_positions=100)
if sys.argv[2] == "writing":
    files._write_json = killed_write
else:
    build.model_index.steps = killed_steps
load(sys.argv[1])
"""


@pytest.mark.parametrize("moment", [STAGES[-1], "writing"])
def test_a_killed_build_leaves_what_the_next_one_cleans(
    folder, flash_head_home, moment, monkeypatch
):
    checkout = Path(mlx_flashhead.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), moment],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert cache.entries() == []
    left = list((flash_head_home / "flash_heads").iterdir())
    assert len(left) == (moment == "writing")
    for temporary in left:
        os.utime(temporary, (0, 0))
    few = functools.partial(IndexOptions, calibration_positions=100)
    monkeypatch.setattr(build, "IndexOptions", few)
    model, _ = mlx_flashhead.load(str(folder))
    assert mlx_flashhead.get_flash_head(model) is not None
    (entry,) = cache.entries()
    assert list((flash_head_home / "flash_heads").iterdir()) == [entry.folder]


def test_a_build_that_is_cut_short_says_so(loaded):
    options = IndexOptions(quick=True, calibration_seconds=1e-6)
    config = model_index(*loaded, options, progress=False).config
    positions = config.calibration["positions"]
    assert config.calibration["cut_short"] and positions < 4000
    (sentence,) = cut_short(config)
    assert f"cut short by the time limit, after {positions:,} positions" in sentence
    whole = model_index(*loaded, OPTIONS, progress=False).config
    assert "cut_short" not in whole.calibration and cut_short(whole) == []


def test_bars_of_all_stages(loaded, capsys):
    model_index(*loaded, OPTIONS)
    shown = capsys.readouterr()
    assert all(f"{stage}: 100%" in shown.err for stage in STAGES)
    assert shown.out == ""
