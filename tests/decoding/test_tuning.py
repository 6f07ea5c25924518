"""What is measured on a machine, and the settings that follow from it."""

from itertools import cycle

import pytest

from flash_loops import OTHERS, make_flash
from mlx_flashhead.decoding import tuning
from mlx_flashhead.decoding.part_times import PartTimes
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.decoding.tuning import Tuning, least_gain, tune
from mlx_flashhead.decoding.waste import overhead


def measured(*arguments, between=lambda: None, **options):
    """What a tuning finds, when all its steps are taken."""
    steps = tune(*arguments, **options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        between()


@pytest.mark.parametrize("slow", [False, True])
def test_a_measurement_chooses_and_changes_no_text(slow):
    flash = make_flash()
    before, texts = flash.tokens(), []
    shares = [{"n_probes": n, "greedy_differs": s} for n, s in ((1, 0.5), (13, 0.0))]
    # as an index keeps them: in 1/10,000 and one more, negative where the proposal differs
    shares.append({"n_probes": 3, "greedy_differs": 0.3, "risks": [101, -2001, 11] * 30})
    options = {"seconds": 0.0 if slow else 1.0, "between": lambda: texts.append(flash.tokens())}
    found = measured(flash.model, shares, **options)
    assert texts and all(text == before for text in texts)
    assert found.n_probes in (1, 3, 13) and 1 <= found.max_pending <= 32
    assert found.gain > 0 and found.dense == (found.gain < least_gain())
    assert found.predicted == slow
    policy = policy_of(flash.head)
    assert (flash.head.n_probes, flash.head.unverified_probes) == (found.n_probes, 3)
    assert (policy.max_risk, policy.dense) == (found.max_risk, found.dense)
    for policy.max_risk in (0.0, 0.3):  # of no account for the text
        assert flash.tokens() == before
    policy.dense = True
    assert flash.tokens() == before == flash.tokens(dense=True)


@pytest.mark.parametrize("gain", [0.9, 1.1, 2.0])
@pytest.mark.parametrize("busy", [False, True])
def test_the_steady_gain_is_measured(monkeypatch, gain, busy):
    """On a machine whose clock is made up: a verification takes as long for 8 states as for 32."""
    flash, clock, slow = make_flash(), [0.0], cycle([1, 1, 1 + busy])
    flat, k, dense = 0.003, 32, 0.006
    step = dense / gain - flat / k

    class Parts(PartTimes):
        def takes(self, n, seconds, extra=0.0):
            seconds *= next(slow)
            clock[0] += n * seconds + extra
            return [seconds] * (n - 1) + [seconds + extra]

        def steps(self, n, n_probes=None, depth=None, *, verified=False, sampled=False):
            return self.takes(n, step if n_probes else dense, flat if verified else 0.0)

        def verification(self, k):
            return self.takes(1, flat)[0]

        def max_batch(self, *_):
            return 8

    monkeypatch.setattr(tuning, "PartTimes", Parts)
    monkeypatch.setattr(tuning, "is_busy", lambda: False)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    shares = [{"n_probes": 3, "greedy_differs": 0.0, "risks": [1] * 500}]
    found = measured(flash.model, shares)
    assert clock[0] <= 10
    assert found.provisional == busy
    if not busy:
        assert found.max_pending == k
        assert found.gain == pytest.approx(gain, rel=0.02)


@pytest.mark.parametrize(
    "chances, k, n_verifications, n_wasted, n_tokens",
    [
        ([0.0] * 8, 4, 2, 0, 8),
        ([1.0], 1, 1, 1, 1),  # the step that runs when the verification is read
        ([0.0, 1.0, 0.0, 0.0], 4, 2, 3, 4),  # that one, and two behind the rejected token
        ([0.5, 0.0], 2, 1, 1.0, 1.5),
    ],
)
def test_the_steps_that_a_rejected_token_wastes(chances, k, n_verifications, n_wasted, n_tokens):
    found = overhead([0.0] * len(chances), chances, 0.01, 0.5, k, max_risk=1.0)
    assert found == pytest.approx((n_verifications * 0.5 + n_wasted * 0.01) / n_tokens)


def test_a_round_verifies_as_many_tokens_as_it_takes(monkeypatch):
    flash, verified = make_flash(), []
    parts = PartTimes(flash.model)
    judge = parts._certain
    monkeypatch.setattr(
        parts,
        "_certain",
        lambda each, *given: verified.append(len(each.hidden)) or judge(each, *given),
    )
    for n in (1, 4, 32):
        assert len(parts.steps(n, 3, verified=True)) == len(parts.steps(n)) == n
    assert verified == [1, 4, 32]


def test_settings_of_another_machine():
    flash = make_flash()
    Tuning(500, 1e30, 8, 0.1, 1.2, 0.01, 0.0, dense=False).apply(flash.head)
    assert flash.head.n_probes == flash.head.n_clusters and flash.head.unverified_probes == 3
    flash.head.n_probes, before = 3, flash.batch(OTHERS, dense=True)[0]
    for policy_of(flash.head).max_batch in (None, 1, 2, 3):
        assert flash.batch(OTHERS)[0] == before
