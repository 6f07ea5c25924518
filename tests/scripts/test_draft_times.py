"""The estimates of trained drafters: what a draft reads, and the formula of a round."""

import pytest

import draft_times
from apple_estimates import CHAT, CHIPS
from draft_times import by_depth, draft_costs, draft_us, drafted_gain, drafters
from step_times import chips, models
from wide_times import wide_us


def test_shares_have_sources_and_deeper_ones_are_as_the_last():
    assert len(drafters()) == 6
    for model, drafter in drafters().items():
        assert model in models()
        assert drafter.source.startswith("https://")
        assert drafter.measured_on
        assert all(0 < share < 1 for share in drafter.shares)
    assert by_depth((0.9, 0.8)) == [0.9, *[0.8] * 6]


@pytest.mark.parametrize(
    "model, layer, left", [("qwen3.8-27b", 451e6, 0.45), ("qwen3.5-35b-a3b", 68e6, 0.27)]
)
def test_a_flash_head_cuts_what_a_draft_reads(model, layer, left):
    """Of the head in 4 bits a tenth is left, and of an MTP layer in 8 bits all."""
    of = models()[model]
    drafter = drafters()[model]
    assert drafter.weights * 1.0625 == pytest.approx(layer, rel=0.01)
    chip = chips()["m4"]
    dense, few = (draft_us(of, drafter, chip, 4, each) for each in (False, True))
    assert few < dense
    bytes_left = (layer + 0.11 * of.head * 0.5625) / (layer + of.head * 0.5625)
    assert bytes_left == pytest.approx(left, abs=0.05)
    assert few / dense == pytest.approx(bytes_left, abs=0.12)


def test_a_round_is_its_drafts_and_its_step():
    costs = draft_costs("qwen3.8-27b", "m2", 4, True)
    of = models()["qwen3.8-27b"], chips()["m2"], 4, 4
    assert costs.times[4] / costs.times[2] == pytest.approx(wide_us(*of, 4) / wide_us(*of, 2))
    tokens = 1 + 0.93 + 0.93 * 0.87 + 0.93 * 0.87**2
    wrong = 1 - 0.93 * 0.87**2
    expected = tokens / (costs.times[4] + 3 * costs.draft + wrong * costs.wrong)
    found, width = drafted_gain("qwen3.8-27b", "m2", 4, True, (0.93, 0.87))
    assert width == 4
    # It comes beside what the head alone gains.
    assert found == pytest.approx(expected, rel=0.05)


def test_flash_heads_drafts_are_never_slower_and_mixtures_seldom_pay():
    for model, drafter in drafters().items():
        for chip in CHIPS:
            for shares in (drafter.shares, CHAT):
                dense, _ = drafted_gain(model, chip, 4, False, shares)
                few, width = drafted_gain(model, chip, 4, True, shares)
                assert few >= dense * 0.999
                if models()[model].experts:
                    assert width == 1 or few < 1.2


def test_a_published_gain_is_near_the_estimate():
    """Qwen3.6-27B on an M4 Max with two drafts: 18.9 to 33.0 tokens a second (MTPLX 64)."""
    costs = draft_costs("qwen3.8-27b", "m4-max", 4, False)
    only_two = costs._replace(times={3: costs.times[3]})
    found = draft_times.gain(3, by_depth((0.93, 0.87)), only_two)
    assert found == pytest.approx(33.0 / 18.9, rel=0.1)
