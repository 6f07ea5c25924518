"""scripts/kernel_report.py: its figures against what they must be for a 4-bit head."""

import json
import sys

import pytest

import kernel_report
from kernel_cases import on_gpu

pytestmark = pytest.mark.skipif(on_gpu(), reason="the report counts on the emulator")


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(kernel_report, "SHAPES", {"Small": (8192, 576)})
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", *map(str, arguments)])
    kernel_report.main()
    return capsys.readouterr().out


def test_report_of_a_head(monkeypatch, capsys, tmp_path):
    path = tmp_path / "report.json"
    n_probes, vocab_size, hidden_size = 16, 8192, 576
    arguments = ["--n-probes", n_probes, "--json", path]
    printed = run(monkeypatch, capsys, *arguments)
    (report,) = json.loads(path.read_text()).values()
    assert report["vocab_size"] == vocab_size and report["hidden_size"] == hidden_size
    assert report["n_clusters"] == vocab_size // 16 and report["n_probes"] == n_probes
    assert "All threadgroups ran" in printed

    kernels = report["kernels"]
    barriers = {name: kernel["barriers"] for name, kernel in kernels.items()}
    assert barriers == {
        "route": 0, "select_words": 6, "score": 1, "expand": 1, "select": 6, "sample": 2,
    }  # fmt: skip
    assert all(f"{name}: threads " in printed for name in kernels)

    # 4 bits and, for each 64 weights, two 16-bit numbers
    row_bytes = hidden_size // 2 + 2 * 2 * hidden_size // 64
    weight_bytes = {
        "route": vocab_size // 16 * hidden_size // 2,
        "score": n_probes * 16 * hidden_size // 2,
    }
    for name, n_bytes in weight_bytes.items():
        assert kernels[name]["buffers"]["weight"]["read_bytes"] == n_bytes
        assert kernels[name]["buffers"]["weight"]["distinct_read_lines"] == n_bytes // 128
    assert 1 <= report["route_lines_over_bytes"] <= 1.05
    assert 1 <= report["score_lines_over_bytes"] <= 1.05
    # a word for each token, and a logit where it was scored
    assert report["expand_gathers_per_token"] == pytest.approx(1 + n_probes * 16 / vocab_size)
    assert f"Gathers of expand: {report['expand_gathers_per_token']:.2f} per token" in printed
    assert kernels["expand"]["buffers"]["expanded"]["written_bytes"] == 2 * vocab_size
    dense_bytes = vocab_size * row_bytes + 2 * hidden_size + 2 * vocab_size
    assert report["dense_mb"] == pytest.approx(dense_bytes / 1e6, rel=1e-4)
    needed = (vocab_size // 16 + 16 * n_probes) * row_bytes  # centroids and probed rows
    assert needed < report["greedy_token_mb"] * 1e6 < report["full_logits_mb"] * 1e6
    extra = 4 * vocab_size + 2 * vocab_size  # slot_of and the logits
    assert report["full_logits_mb"] * 1e6 < 1.1 * (needed + extra)


def test_too_many_probes_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, "--model", "Small", "--n-probes", 513)
    assert stopped.value.code == 2
    assert "choose 1 to 512" in capsys.readouterr().err
