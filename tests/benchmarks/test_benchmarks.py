"""The benchmarks: what is timed computes what it should, and the summaries are right."""

import io
import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.benchmarks import conversion as convert_module
from mlx_flashhead.benchmarks import model as model_module
from mlx_flashhead.benchmarks import positions as positions_module
from mlx_flashhead.benchmarks.conversion import convert_benchmark, index_benchmark, stage_times
from mlx_flashhead.benchmarks.head import (
    CANDIDATES,
    DENSE,
    DENSE_BLOCKS,
    DENSE_COLUMNS,
    DENSE_FORMS,
    LOGITS,
    SHAPES,
    TOKEN,
    chained,
    forms,
    head_benchmark,
    random_head,
)
from mlx_flashhead.benchmarks.model import (
    FLASH_HEAD,
    NO_HEAD,
    decode_seconds,
    model_benchmark,
    sampling_seconds,
    without_head,
)
from mlx_flashhead.benchmarks.positions import DENSE_PATH, crossover, positions_benchmark
from mlx_flashhead.benchmarks.sampler import MLX_LM, OURS, sampler_benchmark, zipf_logprobs
from mlx_flashhead.benchmarks.sampler import SAMPLERS as TIMED_SAMPLERS
from mlx_flashhead.common.timing import in_turns
from mlx_flashhead.models.install import install
from model_folders import write_model
from tiny_models import VOCAB_SIZE, tiny_index, tiny_model


class Tokenizer:
    def encode(self, text):
        return [1, 5, 9]


@pytest.fixture
def models():
    """A dense tiny model, and the same with a FlashHead."""
    flash = tiny_model()
    index = tiny_index(flash)
    install(flash, index.token_ids, index.centroids, n_probes=4)
    return tiny_model(), flash


def test_shapes_are_those_of_the_models():
    assert SHAPES["llama-3.2-1b"] == (128256, 2048)
    assert SHAPES["qwen3-0.6b"] == (151936, 1024)
    assert SHAPES["gemma-3-270m"] == (262144, 640)
    assert SHAPES["gemma-3-1b"] == (262144, 1152)
    assert SHAPES["smollm2"] == (49152, 576)


@pytest.mark.parametrize("bits, dtype", [(16, mx.float32), (16, mx.bfloat16), (4, mx.float16)])
@pytest.mark.parametrize("vocab_size, hidden_size", [(320, 64), (203, 128)])
def test_forms_agree_with_the_rows(bits, dtype, vocab_size, hidden_size):
    head = random_head(vocab_size, hidden_size, n_probes=5, dtype=dtype, bits=bits)
    assert (head.vocab_size, head.hidden_size, head.n_probes) == (vocab_size, hidden_size, 5)
    assert head.clustered.rows.quantized == (bits != 16)
    named = forms(head)
    on_cpu = mx.default_device().type == mx.cpu
    assert (DENSE_BLOCKS in named) == (bits == 16 and on_cpu)
    assert (DENSE_COLUMNS in named) == (bits == 16 and on_cpu and dtype == mx.float32)
    hidden = mx.random.normal((2, hidden_size)).astype(dtype)
    ids, logits = named[CANDIDATES](hidden)
    assert ids.shape == logits.shape == (2, 5 * 16)
    slots = head.clustered.flat_rows().dequantized().astype(mx.float32)[:vocab_size]
    dense = np.array(hidden.astype(mx.float32) @ slots.T)
    loose = {"rtol": 5e-2, "atol": 5e-2} if dtype != mx.float32 else {"rtol": 1e-4, "atol": 1e-4}
    for name in DENSE_FORMS & named.keys():
        logits = np.array(named[name](hidden).astype(mx.float32))
        np.testing.assert_allclose(logits[:, :vocab_size], dense, **loose)
    full = np.array(named[LOGITS](hidden).astype(mx.float32))
    assert full.shape == (2, vocab_size)
    assert (np.array(named[TOKEN](hidden)) == full.argmax(-1)).all()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"n_probes": 21}, "20 clusters"),
        ({"n_probes": 0}, "20 clusters"),
        ({"n_probes": 4, "hidden_size": 72, "bits": 4}, "width of 72"),
    ],
)
def test_random_head_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        random_head(**{"vocab_size": 320, "hidden_size": 64} | arguments)


@pytest.mark.parametrize("n_positions", [1, 3])
def test_head_benchmark_reports(n_positions):
    head = random_head(320, 64, n_probes=5)
    states = mx.random.normal((7, 64))
    found = head_benchmark(head, states, n_positions=n_positions, rounds=3, progress=False)
    json.dumps(found)
    assert (found["positions"], found["n_clusters"], found["head_bits"]) == (n_positions, 20, 32)
    assert found["dtype"] == "float32" and found["head_mb"] == pytest.approx(320 * 64 * 4 / 1e6)
    # float32 centroids on a CPU, and the probed clusters' rows
    stage_1 = 20 * 64 * 4 if mx.default_device().type == mx.cpu else 20 * 64 * 9 / 16
    assert found["read_mb"] == pytest.approx((stage_1 + 5 * n_positions * 16 * 64 * 4) / 1e6)
    ms = {name: spread["median"] for name, spread in found["ms"].items()}
    assert all(found["ms"][name]["runs"] == 3 for name in ms)
    best = found["best_dense"]
    assert ms[best] == min(ms[name] for name in DENSE_FORMS & ms.keys())
    for name in (CANDIDATES, TOKEN, LOGITS):
        for dense in (DENSE, best):
            ratio = found["times_faster"][f"{name} against {dense}"]
            assert ratio == pytest.approx(ms[dense] / ms[name])


def test_positions_benchmark_reports(monkeypatch):
    """FlashHead is made to take a millisecond a position, and the dense head always four."""
    numbers = iter((1, 3, 9))

    def timed(runs, rounds, **options):
        number = next(numbers)
        real = in_turns(runs, rounds, **options)
        ms = {name: number if name == LOGITS else 4 for name in runs}
        return {name: [ms[name] / 1000] * len(taken) for name, taken in real.items()}

    monkeypatch.setattr(positions_module, "in_turns", timed)
    head = random_head(320, 64, n_probes=5)
    head.max_positions = 4
    states = mx.random.normal((7, 64))
    found = positions_benchmark(head, states, counts=(9, 1, 3), rounds=2, progress=False)
    json.dumps(found)
    assert (found["counts"], found["max_positions"], head.max_positions) == ([1, 3, 9], 4, 4)
    assert found["ms"].keys() == {DENSE, DENSE_PATH, LOGITS}
    assert [spread["median"] for spread in found["ms"][LOGITS]] == pytest.approx([1, 3, 9])
    assert {spread["runs"] for spreads in found["ms"].values() for spread in spreads} == {2}
    assert found["crossover"] == {"last_faster": 3, "slower_from": 9}


def test_positions_benchmark_times_what_it_says(monkeypatch):
    """FlashHead retrieves at every number, beside the path taken above max_positions."""
    head = random_head(320, 64, n_probes=5)
    seen = {}

    def look(runs, rounds, **_):
        seen.update({name: np.array(run(1)) for name, run in runs.items()})
        return {name: [1.0] for name in runs}

    monkeypatch.setattr(positions_module, "in_turns", look)
    states = mx.random.normal((80, 64))
    positions_benchmark(head, states, counts=(40,), rounds=1, progress=False)
    hidden = states[mx.arange(40, 80)]
    np.testing.assert_allclose(seen[DENSE_PATH], head.dense_logits(hidden), atol=1e-5)
    retrieving = head.copy()
    retrieving.max_positions = 40
    np.testing.assert_allclose(seen[LOGITS], retrieving(hidden), atol=1e-5)
    assert not np.allclose(seen[LOGITS], seen[DENSE_PATH], atol=1e-3)


@pytest.mark.parametrize(
    "flash, dense, last_faster, slower_from",
    [
        ((1, 2, 5), (3, 3, 3), 2, 4),
        ((4, 2, 2), (3, 3, 3), 4, None),  # a head too small for one row
        ((1, 1, 1), (3, 3, 3), 4, None),
        ((4, 4, 4), (3, 3, 3), None, 1),
        ((3, 3, 3), (3, 3, 3), None, 1),
    ],
)
def test_crossover(flash, dense, last_faster, slower_from):
    ms = {
        LOGITS: [{"median": value} for value in flash],
        DENSE_PATH: [{"median": value} for value in dense],
    }
    expected = {"last_faster": last_faster, "slower_from": slower_from}
    assert crossover((1, 2, 4), ms) == expected


def test_chain_calls_the_form_with_each_state():
    states = [mx.full((1, 4), value) for value in (1.0, 2.0, 5.0)]
    seen = []

    def form(hidden):
        seen.append(hidden)
        return mx.zeros(1), hidden * 1e30

    found = chained({"form": form}, states, 2)
    assert found["form"]["runs"] == 2
    assert [h[0, 0].item() for h in seen] == [1, 2, 5] * 3


def test_without_head_the_state_is_still_computed(models):
    dense, _ = models
    ids = mx.array([[3, 4]])
    expected, kind = dense(ids), type(dense.model.embed_tokens)
    with without_head(dense):
        first, second = dense(ids), dense(mx.array([[7, 8]]))
        graph = io.StringIO()
        mx.export_to_dot(graph, first)
        assert "Depends" in graph.getvalue() and "Matmul" in graph.getvalue()
        assert first.shape == (1, 2, VOCAB_SIZE)
        assert mx.array_equal(first, second) and mx.array_equal(first[:, 0], first[:, 1])
        steps = [dense(ids[:, :1]) for _ in range(17)]
        assert mx.array_equal(steps[0], first[:, :1]) and mx.array_equal(steps[16], steps[0])
        assert all((steps[0] != other).any() for other in steps[1:16])
    assert mx.array_equal(dense(ids), expected)
    assert type(dense.model.embed_tokens) is kind


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_takes_the_steps_asked_for(models, monkeypatch, batch):
    times = iter(np.cumsum([0, 4, 4, 1, 3]))
    clock = SimpleNamespace(perf_counter=lambda: next(times))  # mlx-lm looks at the real one
    monkeypatch.setattr(model_module, "time", clock)
    shapes = []

    def sampler(logprobs):
        shapes.append(logprobs.shape)
        return mx.argmax(logprobs, axis=-1)

    dense, _ = models
    assert decode_seconds(dense, [1, 2], batch, 4, sampler) == 3.5  # 4, 4, 1, 3
    assert set(shapes) == {(batch, VOCAB_SIZE)}


def test_end_of_text_does_not_end_a_run(models):
    dense, _ = models
    drawn = []

    def sampler(logprobs):
        drawn.append(1)
        return mx.zeros(logprobs.shape[:-1], mx.uint32)

    for batch in (1, 2):
        drawn.clear()
        decode_seconds(dense, [1], batch, 6, sampler)
        assert len(drawn) >= 7


def test_sampler_gets_normalised_logits_of_the_batch(models):
    dense, _ = models
    seen = []

    def sampler(logprobs):
        seen.append(logprobs)
        return mx.argmax(logprobs, axis=-1)

    assert len(sampling_seconds(dense, [1, 2], 3, sampler, 2)) == 2
    sums = mx.exp(seen[-1]).sum(axis=-1)
    assert seen[-1].shape == (3, VOCAB_SIZE) and mx.allclose(sums, mx.ones(3), atol=1e-4)


def test_model_benchmark_sums_up(models, monkeypatch):
    dense, flash = models
    steps = {"dense": 0.010, "flash": 0.004, "none": 0.003}
    order = []

    def decode(model, prompt, batch, tokens, sampler):
        which = "flash" if model is flash else "dense"
        logits = model(mx.array([[1], [2]]))
        if which == "dense" and mx.array_equal(logits[0], logits[1]):
            which = "none"
        order.append(which)
        return steps[which]

    monkeypatch.setattr(model_module, "decode_seconds", decode)
    monkeypatch.setattr(
        model_module, "sampling_seconds", lambda model, *a: [0.0004 if model is flash else 0.001]
    )
    found = model_benchmark(
        dense, flash, Tokenizer(), samplers=("greedy", "top-p"), batches=(1, 2), rounds=2,
        progress=False,
    )  # fmt: skip
    assert [(f["sampler"], f["batch"]) for f in found] == [
        ("greedy", 1), ("greedy", 2), ("top-p", 1), ("top-p", 2),
    ]  # fmt: skip
    rounds = [sorted(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == [["dense", "flash", "none"]] * 3 * 4
    one = json.loads(json.dumps(found))[1]
    assert one["step_ms"]["dense"]["runs"] == 2
    assert one["tokens_per_second"]["dense"]["median"] == pytest.approx(200)
    assert one["tokens_per_second"][NO_HEAD]["median"] == pytest.approx(2 / 0.003)
    assert one["split_ms"][FLASH_HEAD] == pytest.approx({"body": 2, "head": 1.6, "sampling": 0.4})
    assert one["split_ms"]["dense"] == pytest.approx({"body": 2, "head": 7, "sampling": 1})
    assert one["times_faster"] == pytest.approx(2.5)
    assert one["share_of_free_head_saved"] == pytest.approx(6 / 7)


def test_ratios_are_taken_within_a_round():
    """A round in which the machine is slow counts as any other."""
    steps = {"dense": [0.010, 0.100, 0.011], FLASH_HEAD: [0.004, 0.050, 0.006]}
    steps[NO_HEAD] = [0.002, 0.020, 0.001]
    sampling = {"dense": [0.001], FLASH_HEAD: [0.001]}
    one = model_module._summary("greedy", 1, 20, steps, sampling)
    assert one["times_faster"] == pytest.approx(2)  # of 2.5, 2 and 1.83
    assert one["times_faster_with_a_free_head"] == pytest.approx(5)  # of 5, 5 and 11
    assert one["share_of_free_head_saved"] == pytest.approx(0.625)  # of 0.75, 0.625 and 0.5
    assert one["share_of_free_head_saved_quartiles"] == pytest.approx([0.5625, 0.6875])


def test_model_benchmark_runs(models):
    found = model_benchmark(
        *models, Tokenizer(), samplers=("top-p",), batches=(1, 2), tokens=3, rounds=1,
        progress=False,
    )  # fmt: skip
    assert [one["batch"] for one in found] == [1, 2]


def test_models_are_sampled_with_their_own_samplers(models, monkeypatch):
    asked = []

    def maker(*, model, **arguments):
        asked.append("flash" if model is models[1] else "dense")
        return lambda logprobs: mx.argmax(logprobs, axis=-1)

    monkeypatch.setattr(model_module, "make_sampler", maker)
    model_benchmark(
        *models, Tokenizer(), samplers=("top-p",), batches=(1,), tokens=2, rounds=1, progress=False
    )
    rounds = [sorted(asked[i : i + 3]) for i in (0, 3)]
    assert rounds == [["dense", "dense", "flash"]] * 2  # one of the two without its head
    assert asked[6:] == ["dense", "flash"]


def test_zipf_logprobs():
    logprobs = np.array(zipf_logprobs(1000, 2, 3))
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=-1), 1, rtol=1e-4)
    ordered = np.sort(logprobs, axis=-1)[:, ::-1]
    np.testing.assert_allclose(ordered[0], ordered[1], rtol=1e-5)
    assert np.exp(ordered[0, 0] - ordered[0, 1]) == pytest.approx(2**1.1, rel=1e-4)
    assert (logprobs[0] != logprobs[1]).any()
    assert (logprobs != np.array(zipf_logprobs(1000, 2, 4))).any()


def test_sampler_benchmark_reports():
    head = random_head(9000, 32, n_probes=5)
    found = sampler_benchmark(head, n_positions=2, rounds=3, progress=False)
    json.dumps(found)
    assert (found["vocab_size"], found["positions"], found["n_probes"]) == (9000, 2, 5)
    assert found["ms"].keys() == found["times_faster"].keys() == TIMED_SAMPLERS.keys()
    for name, ms in found["ms"].items():
        assert ms[MLX_LM]["runs"] == ms[OURS]["runs"] == 3
        ratio = ms[MLX_LM]["median"] / ms[OURS]["median"]
        assert found["times_faster"][name] == pytest.approx(ratio)


def test_stages_of_a_conversion(tmp_path):
    folder = write_model(tmp_path / "dense")
    found = convert_benchmark(str(folder), calibration_positions=40, n_probes=3, progress=False)
    json.dumps(found)
    seconds = found["seconds"]
    expected = {stage for stage, *_ in convert_module.STAGES} | {"total", "other"}
    assert seconds.keys() | {"probes"} == expected | {"probes"}
    parts = sum(value for name, value in seconds.items() if name != "total")
    assert parts == pytest.approx(seconds["total"]) and min(seconds.values()) >= 0
    assert found["n_probes"] == 3 and found["peak_memory_mb"] > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_stage_times_count_only_within_the_block(monkeypatch):
    from mlx_flashhead.conversion import indexing

    clock = iter(range(100))
    monkeypatch.setattr(convert_module.time, "perf_counter", lambda: next(clock))
    original = indexing.fit_centroids
    monkeypatch.setattr(
        indexing, "fit_centroids", lambda ticks: [next(clock) for _ in range(ticks)]
    )
    with stage_times() as seconds:  # 0
        indexing.fit_centroids(2)  # 1, …, 4
        indexing.fit_centroids(0)  # 5, 6
    # the block ends at 7
    assert seconds == {"centroids": 3 + 1, "other": 3, "total": 7}
    indexing.fit_centroids(1)
    assert seconds["centroids"] == 4
    monkeypatch.undo()
    assert indexing.fit_centroids is original


def test_index_of_a_random_head():
    found = index_benchmark(320, 64, 50, progress=False)
    assert {"clustering", "centroids", "total"} <= found["seconds"].keys()
    assert found["head_mb"] == pytest.approx(320 * 64 * 4 / 1e6)
