"""scripts/kernel_report.py: its figures against what they must be for a 4-bit head."""

import json

import pytest

import kernel_report
from kernel_cases import on_gpu

pytestmark = pytest.mark.skipif(on_gpu(), reason="the report counts on the emulator")
N_PROBES, VOCAB_SIZE, HIDDEN_SIZE = 16, 8192, 576


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_report, "SHAPES", {"Small": (VOCAB_SIZE, HIDDEN_SIZE)})


def test_report_of_a_head(run, tmp_path):
    path = tmp_path / "report.json"
    _, printed, _ = run(kernel_report, "--n-probes", N_PROBES, "--json", path)
    (report,) = json.loads(path.read_text()).values()
    kernels = report["kernels"]
    assert kernels.keys() == {"route", "select_words", "score", "expand", "select", "sample"}
    assert all(f"{name}: threads " in printed for name in kernels)
    assert 1 <= report["route_lines_over_bytes"] <= 1.05
    assert 1 <= report["score_lines_over_bytes"] <= 1.05
    # a word for each token, and a logit where it was scored
    gathers = report["expand_gathers_per_token"]
    assert gathers == pytest.approx(1 + N_PROBES * 16 / VOCAB_SIZE)
    assert f"Gathers of expand: {gathers:.2f} per token" in printed
    # 4 bits and, for each 64 weights, two 16-bit numbers
    row_bytes = HIDDEN_SIZE // 2 + 2 * 2 * HIDDEN_SIZE // 64
    dense_bytes = VOCAB_SIZE * row_bytes + 2 * HIDDEN_SIZE + 2 * VOCAB_SIZE
    assert report["dense_mb"] == pytest.approx(dense_bytes / 1e6, rel=1e-4)
    needed = (VOCAB_SIZE // 16 + 16 * N_PROBES) * row_bytes  # centroids and probed rows
    assert needed < report["greedy_token_mb"] * 1e6 < report["full_logits_mb"] * 1e6
    extra = 4 * VOCAB_SIZE + 2 * VOCAB_SIZE  # slot_of and the logits
    assert report["full_logits_mb"] * 1e6 < 1.1 * (needed + extra)


def test_too_many_probes_are_refused(run):
    code, _, said = run(kernel_report, "--model", "Small", "--n-probes", 513)
    assert code == 2 and "choose 1 to 512" in said
