"""The simulation of the policy of drafts' depth: its traces, and the bounds of the page."""

import json

import numpy as np
import pytest

import depth_policy
from depth_policy import changing, compared, costs_of, texts_of
from mlx_flashhead.decoding.guessing.depth import Costs
from pages import CHECKOUT, with_block
from simulated_texts import drawn, time_of_width


def figures(name):
    return json.loads((CHECKOUT / "docs" / "benchmarks" / name).read_text(encoding="utf-8"))


def test_runs_have_their_shares():
    runs = drawn([0.8, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0], 4000, (0,))
    assert runs.max() == 2
    assert (runs >= 1).mean() == pytest.approx(0.8, abs=0.03)
    assert (runs == 2).mean() == pytest.approx(0.4, abs=0.03)
    parts = changing(256, 0).reshape(4, 64).mean(axis=1)
    assert min(parts[0], parts[2]) > 2 * max(parts[1], parts[3])


def test_the_time_of_a_width():
    costs = Costs({2: 1.2}, draft=0.1, wrong=0.5)
    assert time_of_width(np.array([1, 0, 0, 1]), costs, 1) == 4
    # Right and the token behind it, wrong, and right past the end.
    assert time_of_width(np.array([1, 0, 0, 1]), costs, 2) == pytest.approx(3 * 1.3 + 0.5)


@pytest.mark.parametrize("model", ["qwen3.8-27b", "qwen3.5-35b-a3b"])
@pytest.mark.parametrize("chip", ["m1", "m5", "m3-ultra"])
def test_the_policy_is_bounded(model, chip):
    """On seeded texts, as the whole simulation is."""
    kinds = texts_of(4, 256)
    for kind in ("0.85", "0.5", "0.1", "0.75, 0.5, 0.33"):
        found = compared(kinds[kind], costs_of(model, chip))
        assert max(found["lost_to_none"]) <= 0.02, kind
        assert found["lost_to_best"][1] <= 0.04, kind


def test_the_pages_figures_are_those_of_the_files():
    cases = figures("depth-policy.json")["cases"]
    assert len(cases) == 42 * 16
    page = (CHECKOUT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert with_block(page, "depth policy", list(depth_policy.page_lines(cases))) == page
    assert max(max(case["lost_to_none"]) for case in cases) <= 0.02
    lost = [part for case in cases for part in case["lost_to_best"]]
    few = sum(part <= 0.02 for part in lost)
    quoted = f"Of the {len(lost):,} cases {few:,} lose at most 2 % to the best depth"
    words = " ".join(page.split())
    assert f"{quoted}. The others lose up to {100 * max(lost):.0f} %" in words
    of_kind = {}
    for case in cases:
        of_kind.setdefault(case["texts"], []).append(case["lost_to_best"])
    for kind, lost in of_kind.items():
        assert np.mean(lost, axis=0).max() <= 0.02, kind
    recorded = depth_policy.recorded()
    assert set(recorded) < set(of_kind)
    tried = figures("trained-drafter.json")["figures"]["greedy"]["dense head"]
    runs = recorded["trained drafter, greedy, dense head"]
    assert sum(map(len, runs)) == tried["tried"][0]
    assert sum(int((run >= 1).sum()) for run in runs) == tried["right"][0]
