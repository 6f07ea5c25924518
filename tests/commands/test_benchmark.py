"""``benchmark``: tables, files, the report, and what is refused before the work."""

import json

import pytest

from mlx_flashhead import benchmark as benchmark_command
from mlx_flashhead.benchmarks import server
from mlx_flashhead.benchmarks.options import make_parser
from mlx_flashhead.benchmarks.output import _short, crossover_sentence

HEAD = ("head", "--shape", "320,64", "--n-probes", 3, "--rounds", 1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def check_outputs(run, tmp_path, *arguments):
    """Runs a benchmark with all outputs; returns the screen and the figures."""
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png", "--report")
    code, output, errors = run("benchmark", *arguments, *files)
    assert (code, "Traceback" in errors) == (0, False)
    screen, _, report = output.partition("```json\n")
    if arguments[0] != "convert":  # which has sentences to say
        assert max(len(line) for line in screen.splitlines()) <= 80
    figures = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(report.removesuffix("\n```\n")) == figures
    assert figures["kind"] == arguments[0]
    assert figures["machine"]["versions"]["mlx"] in screen
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    return screen, figures["results"]


def test_head_of_shapes(run, tmp_path):
    screen, results = check_outputs(run, tmp_path, *HEAD, "--shape", "203,128", "--positions", 2)
    assert [(one["vocab_size"], one["hidden_size"]) for one in results] == [(320, 64), (203, 128)]
    settings = {(one["n_probes"], one["positions"], one["dtype"]) for one in results}
    assert settings == {(3, 2, "float32")}
    for one in results:
        ms = one["ms"]["FlashHead candidates"]["median"]
        assert f" {ms:.2f} " in screen


@pytest.mark.parametrize("bits, dtype, stored", [(8, "float16", 8), (16, "bfloat16", 16)])
def test_head_of_other_precisions(run, tmp_path, bits, dtype, stored):
    _, (one,) = check_outputs(run, tmp_path, *HEAD, "--head-bits", bits, "--dtype", dtype)
    assert (one["head_bits"], one["dtype"]) == (stored, dtype)


def test_head_of_a_model(run, converted, tmp_path):
    _, (one,) = check_outputs(
        run, tmp_path, "head", "--model", converted, "--n-probes", 2, "--rounds", 1
    )
    assert (one["n_probes"], one["hidden_size"], one["name"]) == (2, 128, "model")


def test_draft(run, converted, tmp_path):
    screen, (one,) = check_outputs(
        run, tmp_path, "draft", "--model", converted, "--draft-model", converted, "--probes", "1,4",
        "--tokens", 9, "--rounds", 1, "--num-draft-tokens", 2,
    )  # fmt: skip
    assert [form["n_probes"] for form in one["forms"]] == [None, None, 1, 4]
    for form in one["forms"][1:]:
        (line,) = (line for line in screen.splitlines() if f" {form['name']} " in line)
        assert f"{100 * form['acceptance']:.1f} %" in line


def test_positions(run, tmp_path):
    screen, (one, other) = check_outputs(
        run, tmp_path, "positions", "--shape", "320,64", "--shape", "203,64", "--n-probes", 3,
        "--rounds", 2, "--positions", 8, "--positions", 1, "--positions", 40,
    )  # fmt: skip
    assert one["counts"] == other["counts"] == [1, 8, 40]
    said = " ".join(screen.split())
    assert "Crossover: " in said and "(max_positions: 32, measured on a CPU: docs/" in said
    for spreads in one["ms"].values():
        assert [spread["runs"] for spread in spreads] == [2, 2, 2]


def test_positions_of_a_model(run, converted, tmp_path):
    _, (one,) = check_outputs(
        run, tmp_path, "positions", "--model", converted, "--rounds", 1, "--positions", 2
    )
    assert (one["n_probes"], one["counts"], one["name"]) == (4, [2], "model")


def test_host(run, tmp_path):
    screen, (one,) = check_outputs(
        run, tmp_path, "host", "--shape", "320,64", "--n-probes", 9, "--rounds", 1
    )
    added = one["us"]["added by FlashHead full logits"]["median"]
    assert f" {added:.1f} " in screen and "recorded, not run" in screen


def test_server(run, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LENGTHS", (0, 1) * 4)  # the tiny model's context is short
    screen, (one,) = check_outputs(
        run, tmp_path, "server", "--model", converted, "--clients", 3, "--requests", 6,
        "--tokens", 4, "--n-probes", 4,
    )  # fmt: skip
    assert [load["server"] for load in one["loads"]] == ["FlashHead", "dense", "mlx_lm.server"]
    for load in one["loads"]:
        assert load["answered"] + load["hung_up"] == 6
        assert load["as_alone"] == load["answered"]
        assert f" {load['tokens_per_second']['median']:.1f} " in screen
    assert "No answer was lost" in screen


def test_memory_of_a_model(run, converted, tmp_path):
    screen, (one,) = check_outputs(run, tmp_path, "memory", "--model", converted)
    assert (one["name"], one["form"]) == ("model", "32-bit float")
    assert one["head_mb"] == pytest.approx(258 * 128 * 4 / 1e6)
    flash, dense = one["memory"]["FlashHead"], one["memory"]["dense"]
    assert flash["peak_mb"] > flash["held_mb"] > dense["held_mb"]
    assert f"takes {one['more_heads']:.2f} heads more" in " ".join(screen.split())


@pytest.mark.parametrize(
    "last, first, said",
    [
        (8, 16, "still faster at 8 positions, dense from 16 on"),
        (64, None, "still faster at 64 positions, the most that were measured"),
        (None, 1, "dense is faster from 1 on, the fewest positions that were measured"),
    ],
)
def test_crossover_is_said(last, first, said):
    one = {"crossover": {"last_faster": last, "slower_from": first}, "max_positions": 32}
    one["max_positions_reason"] = "set by hand"
    assert said in crossover_sentence(one)


@pytest.mark.parametrize(
    "ms, said",
    [(0.934, "0.93"), (12.344, "12.34"), (123.44, "123.4"), (1234.4, "1234"), (12345.0, "12345")],
)
def test_milliseconds_are_short(ms, said):
    assert _short(ms) == said


def test_known_shape_has_256_probes(monkeypatch):
    parsed = make_parser("").parse_args(["head", "--shape", "Qwen3-0.6B"])
    assert parsed.shape == [("qwen3-0.6b", (151936, 1024))]
    made = []
    monkeypatch.setattr(
        benchmark_command, "random_head", lambda *shape, **form: made.append((shape, form))
    )
    list(benchmark_command._heads(parsed))
    ((shape, form),) = made
    assert shape == (151936, 1024) and form["n_probes"] == 256


def test_model(run, converted, tmp_path):
    screen, results = check_outputs(
        run, tmp_path, "model", "--model", converted, "--n-probes", 2, "--rounds", 1,
        "--tokens", 3, "--batch", 1, "--batch", 2, "--sampler", "greedy",
    )  # fmt: skip
    assert [(one["sampler"], one["batch"]) for one in results] == [("greedy", 1), ("greedy", 2)]
    assert all(one["n_probes"] == 2 for one in results)
    for word in ("tokens/s", "body", "head", "sampling", "no head", "Saved: "):
        assert word in screen


def test_sampler_of_sizes(run, tmp_path):
    screen, results = check_outputs(
        run, tmp_path, "sampler", "--vocab-size", 320, "--vocab-size", 100, "--rounds", 1
    )
    assert [(one["vocab_size"], one["n_probes"]) for one in results] == [(320, 20), (100, 7)]
    for name, ratio in results[0]["times_faster"].items():
        assert name in screen and f" {ratio:.1f} x" in screen


def test_sampler_of_a_model(run, converted, tmp_path):
    _, (one,) = check_outputs(
        run, tmp_path, "sampler", "--model", converted, "--n-probes", 2, "--positions", 3,
        "--rounds", 1,
    )  # fmt: skip
    assert (one["n_probes"], one["positions"], one["name"]) == (2, 3, "model")


def test_samplers_have_the_usual_vocabulary(monkeypatch):
    parsed = make_parser("").parse_args(["sampler"])
    made = []
    monkeypatch.setattr(
        benchmark_command, "random_head", lambda *shape, **form: made.append((*shape, form))
    )
    monkeypatch.setattr(benchmark_command, "sampler_benchmark", lambda *_, **__: {})
    benchmark_command._sampler(parsed)
    assert made == [(128256, 64, {"n_probes": 256})]


def test_convert(run, dense, tmp_path):
    screen, (one,) = check_outputs(
        run, tmp_path, "convert", "--model", dense, "--calibration-positions", 40
    )
    assert 40 <= one["calibration"]["positions"] < 50  # kinds are rounded up
    assert "clustering" in screen and "total" in screen
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_convert_of_a_shape(run, tmp_path):
    _, (one,) = check_outputs(
        run, tmp_path, "convert", "--shape", "320,64", "--calibration-positions", 40
    )
    assert (one["vocab_size"], one["positions"]) == (320, 40)


def test_estimate(run, tmp_path):
    code, output, _ = run("benchmark", "estimate", "--shape", "llama-3.2-1b", "--chip", "m3-max")
    assert code == 0 and "ESTIMATE" in output


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("head",), "give one of --shape --model"),
        (("head", "--shape", "llama"), "is not a shape"),
        (("head", "--shape", "320,0"), "is not a shape"),
        (("head", "--shape", "320,64", "--n-probes", 21), "20 clusters"),
        (("head", "--shape", "320,64", "--n-probes", 0), "--n-probes is 0"),
        (("head", "--shape", "320,72", "--head-bits", 4), "width of 72"),
        ((*HEAD[:3], "--rounds", 0), "--rounds is 0"),
        ((*HEAD, "--positions", 0), "--positions is 0"),
        (("positions",), "give one of --shape --model"),
        (("positions", "--shape", "320,64", "--positions", 0), "--positions is 0"),
        ((*HEAD, "--plot", "a.xyz"), "must end in .png"),
        ((*HEAD, "--json", "absent/a.json"), "cannot be written"),
        (("head", "--model", "./absent"), "no folder"),
        (("model", "--model", "./absent"), "no folder"),
        (("model", "--model", "./absent", "--batch", 0), "--batch is 0"),
        (("model", "--model", "./absent", "--tokens", 0), "--tokens is 0"),
        (("convert", "--model", "./absent"), "no folder"),
        (("convert", "--shape", "320,64", "--calibration-positions", 0), "positions is 0"),
        (("sampler", "--model", "./absent"), "no folder"),
        (("sampler", "--vocab-size", 0), "--vocab-size is 0"),
        (("sampler", "--vocab-size", 320, "--n-probes", 21), "20 clusters"),
        (("memory",), "give one of --shape --model"),
        (("memory", "--shape", "320,72"), "width of 72"),
        (("memory", "--model", "./absent"), "no folder"),
        (("host", "--shape", "320,64", "--rounds", 0), "--rounds is 0"),
        (("sampler", "--positions", 0), "--positions is 0"),
        ((), "COMMAND"),
    ],
)
def test_mistakes(refused, arguments, said):
    assert said in refused("benchmark", *arguments)
