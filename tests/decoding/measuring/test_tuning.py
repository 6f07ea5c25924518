"""What is measured on a machine, and what follows from it."""

from itertools import chain, cycle, repeat

import pytest
from mlx_lm.models.cache import make_prompt_cache

from flash_loops import OTHERS, make_flash
from mlx_flashhead.decoding import clock as clock_module
from mlx_flashhead.decoding import proposer
from mlx_flashhead.decoding.decoder import Decoder
from mlx_flashhead.decoding.measuring import tuning
from mlx_flashhead.decoding.measuring.tuning import tune
from mlx_flashhead.decoding.policy import Tuning, least_gain, policy_of
from mlx_flashhead.decoding.verification import VerifySchedule
from mlx_flashhead.models.install import installed_head
from mlx_flashhead.wide import trial
from mlx_flashhead.wide.step import WideSteps
from wide_checks import of_a_batch

# A dense step takes so many seconds.
DENSE = 0.006
# A verification of any number of tokens takes so many seconds.
VERIFICATION = 0.003


def measured(model, between=lambda: None, **options):
    """What a tuning finds, when all its steps are taken."""
    steps = tune(model, **options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        between()


def test_a_measurement_changes_no_text(monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "MAX_PENDING", 6)
    flash = make_flash()
    flash.head.eos_token_ids = (1,)
    before = flash.tokens()
    texts = []
    found = measured(flash.model, lambda: texts.append(flash.tokens()))
    assert texts and all(text == before for text in texts)
    assert flash.head.eos_token_ids == (1,)
    assert found.gain > 0 and found.dense == (found.gain < least_gain())
    policy = policy_of(flash.head)
    assert (policy.tuning, policy.dense, policy.adapts) == (found, found.dense, True)
    for policy.dense in (False, True):
        assert flash.tokens() == before == flash.tokens(dense=True)


@pytest.fixture
def clock(monkeypatch):
    """The seconds of a clock that is made up; steps and verifications take their time on it.

    It says how long a step takes in which tokens are proposed, and how many times as long all of
    one measurement after the other takes.
    """

    class Clock:
        now = 0.0
        step = DENSE / 2
        slower = repeat(1)

    advance = Decoder._advance
    launch = VerifySchedule._launch

    def advanced(decoder):
        (text,) = decoder.texts
        advance(decoder)
        seconds = Clock.step if text.proposing else DENSE
        Clock.now += seconds * Clock.slow

    def launched(schedule, texts):
        Clock.now += VERIFICATION * Clock.slow
        launch(schedule, texts)

    def timed(*given, of_machine=tuning.token_seconds, **named):
        Clock.slow = next(Clock.slower)
        return of_machine(*given, **named)

    monkeypatch.setattr(Decoder, "_advance", advanced)
    monkeypatch.setattr(VerifySchedule, "_launch", launched)
    monkeypatch.setattr(tuning, "token_seconds", timed)
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(f"time.{name}", lambda: Clock.now)
    return Clock


@pytest.fixture
def exact(clock):
    """A model of which no proposal is rejected, with a gain of 2."""
    flash = make_flash()
    flash.head.n_probes = flash.head.n_clusters
    clock.step = DENSE / 2 - VERIFICATION / tuning.MAX_PENDING
    return flash.model


@pytest.mark.parametrize("gain", [0.9, 1.1, 2.0])
def test_the_steady_gain_is_measured(clock, exact, gain):
    """The first verification of a text, which a ramp would have early, does not count."""
    clock.step = DENSE / gain - VERIFICATION / tuning.MAX_PENDING
    found = measured(exact)
    assert not found.busy
    assert (found.gain, found.sampled_gain) == pytest.approx((gain, gain))
    assert found.dense_seconds == pytest.approx(DENSE)


# How many times as long a turn takes: dense and proposed tokens of greedy text, then of sampled.
QUIET = [1, 1, 1, 1]
DISTURBED = [2, 1, 1, 1]
DISTURBED_SAMPLED = [1, 1, 1, 3]


@pytest.mark.parametrize("disturbed", [DISTURBED, DISTURBED_SAMPLED])
def test_turns_go_on_until_they_agree(clock, exact, disturbed):
    """One disturbed turn of the first three: the middle of more turns decides."""
    n_measured = 0

    def noted():
        nonlocal n_measured
        n_measured += 1

    clock.slower = chain([1], QUIET, disturbed, repeat(1))
    found = measured(exact, noted)
    assert not found.busy and (found.gain, found.sampled_gain) == pytest.approx((2, 2))
    # Of five turns one on each side is left out.
    assert n_measured == 1 + 5 * len(QUIET)


def test_turns_that_never_agree_decide_nothing(clock, exact, monkeypatch):
    """However much they gain."""
    monkeypatch.setattr(tuning, "SECONDS", 10.0)
    clock.slower = chain([1], cycle([*QUIET, *DISTURBED, 5, 1, 1, 1]))
    found = measured(exact)
    assert found.gain > least_gain() and found.busy and found.dense
    assert policy_of(installed_head(exact)).dense
    clock.slower = repeat(1)
    assert not measured(exact).dense


@pytest.mark.parametrize("spread, settled", [(0.09, True), (0.11, False)])
def test_gains_agree_within_a_tenth(spread, settled):
    middle = [2 * (1 + spread / 2), 2 * (1 - spread / 2), 2.0]
    assert tuning.agree(middle) == settled
    # Two on each side of eight are left out, however far they lie.
    assert tuning.agree([9.0, 8.0, *middle, 2.0, 0.1, 0.2]) == settled


@pytest.mark.parametrize("gpu", [False, True])
def test_others_take_the_time_of_a_gpu_alone(clock, exact, monkeypatch, gpu):
    """A CPU's seconds are those of this process, so that it does not matter who else works."""
    monkeypatch.setattr(tuning, "is_busy", lambda: True)
    for module in (tuning, clock_module):
        monkeypatch.setattr(module, "gpu_is_default", lambda: gpu)
    other = "process_time" if gpu else "perf_counter"
    monkeypatch.setattr(f"time.{other}", lambda: 0.0)
    found = measured(exact)
    assert found.gain == pytest.approx(2) and found.busy == found.dense == gpu


def test_what_ordinary_text_wastes_counts(exact):
    """A rejected token, and a quarter of the tokens of its verification, are computed in vain."""
    usual = measured(exact)
    found = measured(exact, rejected=(0.01, 0.02))
    assert found.gain == pytest.approx(usual.gain / 1.09)
    assert found.sampled_gain == pytest.approx(usual.sampled_gain / 1.18)


def test_rounds_with_a_rejected_token_are_left_out(clock, misses, monkeypatch):
    """Their share of a text of no meaning says nothing about others."""
    monkeypatch.setattr(tuning, "MOST_ROUNDS", 60)
    flash = make_flash(num_hidden_layers=2)
    flash.head.n_probes = 20
    found = [tuning.token_seconds(flash.model, first, 2) for first in range(5)]
    assert misses
    assert found == pytest.approx([clock.step + VERIFICATION / 2] * 5)


def test_a_head_that_is_always_wrong_takes_the_time_that_it_takes(clock, monkeypatch):
    flash = make_flash()
    monkeypatch.setattr(tuning, "MOST_ROUNDS", 1)
    n = 4
    seconds = tuning.token_seconds(flash.model, 0, n)
    assert seconds > clock.step + VERIFICATION / n


def test_a_slow_machine_takes_few_tokens(clock, monkeypatch):
    """As text may wait for its verification: four, however long they take."""
    sizes = []

    def timed(model, first, n, *, sampled=False, dense=False):
        sizes.append(n)
        clock.now += 2.0
        if dense:
            return 1.0
        return 0.5

    monkeypatch.setattr(tuning, "token_seconds", timed)
    found = measured(make_flash().model)
    # Greedy and drawn, dense and proposed, in three turns.
    assert sizes == [tuning.FEW] * 13
    assert (found.gain, found.sampled_gain, found.dense_seconds) == (2, 2, 1)


def test_what_was_measured_is_used_unless_a_user_overrides_it():
    policy = policy_of(make_flash().head)
    slow = Tuning(gain=1.01, sampled_gain=0.9, dense_seconds=1.0)
    policy.take(slow)
    assert policy.dense and policy.sampled_dense and policy.adapts
    policy.take(slow, always=True)
    assert not (policy.dense or policy.sampled_dense or policy.adapts)
    assert policy.tuning == slow


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_larger_batch_is_dense(monkeypatch, most):
    flash = make_flash()
    expected = flash.batch(OTHERS, dense=True)[0]
    monkeypatch.setattr(proposer, "CPU_BATCH", most)
    assert flash.batch(OTHERS)[0] == expected


def test_steps_of_several_tokens_are_tried_and_timed_once(monkeypatch):
    """As on a GPU: for a text alone, and for one that is alone in a batch."""
    monkeypatch.setattr(tuning, "gpu_is_default", lambda: True)
    monkeypatch.setattr(trial, "LONG", (60,))
    flash = make_flash()
    caches = make_prompt_cache(flash.model)
    tuning.prepare_wide_steps(flash.model)
    monkeypatch.setattr(trial, "_tried", None)
    steps = WideSteps.of(flash.model)
    for each in (caches, of_a_batch(caches)):
        costs = trial.established_costs(steps, each)
        assert list(costs) == [2, 3, 4, 8] and min(costs.values()) > 0


def test_a_cpu_tries_no_steps_of_several_tokens():
    flash = make_flash()
    tuning.prepare_wide_steps(flash.model)
    assert not WideSteps.of(flash.model).established
