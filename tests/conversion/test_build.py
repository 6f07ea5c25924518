"""From a model to an index: in steps, dropped without a trace, and what is chosen and reported."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.conversion import build, probes, run_task
from mlx_flashhead.conversion.build import build_index, expected_seconds, model_index
from mlx_flashhead.conversion.centroids import fit_centroids, logit_metric
from mlx_flashhead.conversion.clusters import cluster_rows
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.conversion.report import report_lines
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.models.locate import find_head
from model_folders import write_model
from retrieval import best_token, candidates
from tiny_models import random_rows

OPTIONS = IndexOptions(quick=True, calibration_positions=200)
STAGES = ["Reading built-in text", "Clustering", "Fitting", "Rounding", "Measuring"]
VOCAB_SIZE = 403
# So many of 400 positions are held out.
HELD_OUT = 100


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model, tokenizer = mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "m")))
    return model, tokenizer, find_head(model)


def test_between_the_steps_the_model_is_as_it_was_and_the_index_is_the_same(loaded):
    """And it writes its own text. Dropped at any step, the build leaves nothing behind."""

    def text():
        return mlx_lm.generate(loaded[0], loaded[1], "One day", max_tokens=8)

    methods = dict(type(loaded[2].module).__dict__)
    expected = text()
    key = mx.array(mx.random.state[0])
    done = dict.fromkeys(STAGES, 0)
    stages = []
    indexes = []

    def steps():
        indexes.append((yield from model_index(*loaded, OPTIONS, step_seconds=0.0)))

    for step in steps():
        if step.stage not in stages:
            stages.append(step.stage)
            # Its bar comes before its work.
            assert step.added == 0 or step.stage == "Rounding"
            assert text() == expected
            dropped = model_index(*loaded, OPTIONS)
            next(step for step in dropped if step.stage == stages[-1])
            dropped.close()
            assert dict(type(loaded[2].module).__dict__) == methods
        if step.stage == STAGES[0]:
            assert step.added <= 16
        done[step.stage] += step.added
        # Some rows of a clustering are read again.
        if step.stage != "Clustering":
            assert 0 <= done[step.stage] <= step.total
    assert stages == STAGES
    assert mx.array_equal(mx.random.state[0], key)
    at_once = run_task(model_index(*loaded, OPTIONS)).config
    assert indexes[0].config.n_clusters == at_once.n_clusters
    about = {"source": "builtin", "quick": True, "positions": 200, "seed": 0}
    assert indexes[0].config.calibration == at_once.calibration == about


def test_the_expected_time_grows_with_the_head_and_the_text(monkeypatch):
    monkeypatch.setattr(build.timeit, "repeat", lambda *_, **__: [1.0])

    def seconds(n_rows, positions):
        options = IndexOptions(calibration_positions=positions)
        return sum(expected_seconds(Matrix(mx.zeros((n_rows, 64))), options).values())

    assert 0 < seconds(1000, 100) < seconds(1000, 12_000) < seconds(20_000, 12_000)


def make_case(**kwargs):
    """Rows, states, and the tokens that followed: drawn from the head's distribution."""
    rng = np.random.default_rng(0)
    rows = random_rows(rng, VOCAB_SIZE, 64, **kwargs)
    states = (np.random.default_rng(1).normal(size=(400, 64)) + 0.5).astype(np.float32)
    logits = np.array(rows.matmul(mx.array(states)).astype(mx.float32))
    return rows, states, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def indexed(rows, states=None, next_ids=None, *, body_bytes=0, **options):
    options = IndexOptions(**{"cluster_size": 8} | options)
    return run_task(build_index(rows, options, states, next_ids, body_bytes=body_bytes))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("kwargs", [{}, {"bias": True}, {"bits": 4}, {"dtype": mx.bfloat16}])
def test_report_is_what_the_head_does_on_held_out_states(kwargs, monkeypatch):
    """The last quarter; the head itself serves as the reference."""
    # All bytes may be read.
    monkeypatch.setattr(probes, "MAX_BYTES", 1.0)
    rows, states, next_ids = make_case(**kwargs)
    index = indexed(rows, states, next_ids, target_agreement=0.9)
    config = index.config
    report = index.config.report
    held_out = mx.array(states[-HELD_OUT:])
    followed = next_ids[-HELD_OUT:]
    head = FlashHead(rows, index.token_ids, index.centroids, n_probes=8, backend="mlx")
    dense = log_softmax(np.array(head(held_out).astype(mx.float32), dtype=np.float64))
    positions = np.arange(HELD_OUT)
    best = dense.argmax(axis=1)
    probability = np.exp(dense)
    dense_loss = -dense[positions, followed].mean()
    assert report["positions"] == HELD_OUT
    assert report["dense_perplexity"] == pytest.approx(np.exp(dense_loss), rel=1e-3)
    stored = rows.nbytes
    read = index.centroids.routing_bytes
    differing = {row["n_probes"]: row for row in config.verification["by_probes"]}
    for row in report["by_probes"]:
        head.unverified_probes = row["n_probes"]
        ids = np.array(candidates(head, held_out)[0]).astype(int)
        scored = np.zeros((HELD_OUT, VOCAB_SIZE + 1), bool)
        np.put_along_axis(scored, ids, True, axis=1)
        found = np.array(best_token(head, held_out)) == best
        assert row["agreement"] == pytest.approx(found.mean())
        assert row["coverage"] == pytest.approx(scored[positions, followed].mean())
        logits = head.unverified_logits(held_out, row["n_probes"]).astype(mx.float32)
        estimated = log_softmax(np.array(logits, dtype=np.float64))
        ratio = np.exp(-estimated[positions, followed].mean() - dense_loss)
        assert row["perplexity_ratio"] == pytest.approx(ratio, rel=1e-2)
        kl = (probability * (dense - estimated)).sum(axis=1).mean()
        assert row["kl"] == pytest.approx(kl, rel=0.05, abs=5e-3)
        n_bytes = read + stored / VOCAB_SIZE * 8 * row["n_probes"]
        assert row["bytes_per_token"] == round(n_bytes)
        assert row["bytes_share"] == pytest.approx(n_bytes / stored)
        differs = differing[row["n_probes"]]
        unscored = ~scored[:, :VOCAB_SIZE]
        assert differs["greedy_differs"] == pytest.approx(unscored[positions, best].mean())
        missed = (probability * unscored).sum(1).mean()
        assert differs["sampled_differs"] == pytest.approx(missed, abs=2e-3)
    assert report["dense_bytes"] == stored
    assert config.n_probes in differing
    (chosen,) = (row for row in report["by_probes"] if row["n_probes"] == config.n_probes)
    assert {key: report[key] for key in ("agreement", "coverage", "kl")}.items() <= chosen.items()
    # 95 of 100 are 90 % and about 1.645 standard errors of 3 points.
    for n_probes in (8, 16, 24, 32, 40, 48, 51):
        head.unverified_probes = n_probes
        if (np.array(best_token(head, held_out)) == best).mean() >= 0.95:
            break
    assert config.unverified_probes == n_probes


def test_tokens_that_a_model_rules_out_spoil_no_measure():
    rows, states, next_ids = make_case(bias=True)
    bias = np.array(rows.bias)
    bias[np.setdiff1d(np.arange(VOCAB_SIZE), next_ids)[:5]] = -np.inf
    report = indexed(replace(rows, bias=mx.array(bias)), states, next_ids).config.report
    measured = [value for row in report["by_probes"] for value in row.values()]
    assert np.isfinite([report["dense_perplexity"], *measured]).all()


def test_clusters_and_centroids_are_made_of_the_states_that_are_not_held_out():
    rows, states, next_ids = make_case()
    weight = np.array(rows.weight)
    known = states[:-HELD_OUT]
    index = indexed(rows, states, next_ids, seed=7)
    expected = run_task(cluster_rows(weight, 8, metric=logit_metric(known), seed=7))
    np.testing.assert_array_equal(index.token_ids, expected)
    fitted = run_task(fit_centroids(weight, expected, known))
    assert mx.array_equal(index.centroids.matrix.weight, fitted.matrix.weight)
    assert mx.array_equal(index.centroids.bias, fitted.bias)


def test_without_states():
    rows, _, _ = make_case()
    index = indexed(rows, seed=7)
    config = index.config
    # 8 is 51 / 6.
    assert (config.n_clusters, config.n_probes, config.unverified_probes) == (51, 8, 8)
    assert config.calibration == {"positions": 0, "seed": 7}
    assert report_lines(config) == ["8 of 51 clusters per token, not calibrated"]
    assert config.report == config.verification == {}
    by_direction = run_task(cluster_rows(np.array(rows.weight), 8, seed=7))
    np.testing.assert_array_equal(index.token_ids, by_direction)


def test_settings_are_recorded():
    rows, states, next_ids = make_case()
    options = IndexOptions(cluster_size=16, seed=7, n_probes=5)
    about = {"eos_token_ids": (9, 2, 1000, "x"), "calibration": {"source": "file"}}
    index = run_task(build_index(rows, options, states, next_ids, **about))
    config = index.config
    assert (config.n_clusters, config.cluster_size) == (26, 16) == index.token_ids.shape
    assert config.n_probes == config.unverified_probes == 5
    # The others are no rows of this head.
    assert config.eos_token_ids == (2, 9)
    assert config.calibration == {"source": "file", "positions": 400, "seed": 7}
    assert config.fingerprint == rows.fingerprint
    assert (config.centroid_bits, config.centroid_group_size) == (4, 64)
    assert json.loads(json.dumps(config.to_dict(), allow_nan=False)) == config.to_dict()


def test_the_head_is_compared_with_the_one_before_its_quantization():
    original, states, next_ids = make_case()
    rows = original.quantize(bits=8, group_size=64)
    config = run_task(build_index(rows, IndexOptions(), states, next_ids, original=original)).config
    compared = config.report["head_bits"]
    assert compared["positions"] == HELD_OUT

    def log_probabilities(matrix):
        return log_softmax(np.array(matrix.matmul(mx.array(states[-HELD_OUT:])), np.float64))

    expected = log_probabilities(original)
    truth = next_ids[-HELD_OUT:, None]
    heads = {4: original.quantize(bits=4, group_size=64), 8: rows, 32: original}
    for row, (bits, head) in zip(compared["rows"], heads.items(), strict=True):
        found = log_probabilities(head)
        kl = (np.exp(expected) * (expected - found)).sum(axis=1).mean()
        loss = -np.take_along_axis(found, truth, axis=1).mean()
        assert (row["bits"], row["bytes"]) == (bits, head.nbytes)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["perplexity"] == pytest.approx(np.exp(loss), rel=1e-3)
        assert row["agreement"] == (found.argmax(1) == expected.argmax(1)).mean()
        assert row["flash_head_ms"] > 0
        assert row["dense_ms"] > 0


@pytest.mark.parametrize(
    ("n", "value", "said"),
    [
        (1, 0.0, "1 calibration positions are too few"),
        (40, np.inf, "NaN or infinity: check the model"),
    ],
)
def test_bad_states(n, value, said):
    rows, states, next_ids = make_case()
    given = np.full_like(states[:n], value), next_ids[:n]
    with pytest.raises(ValueError, match=said):
        run_task(build_index(rows, IndexOptions(), *given))
