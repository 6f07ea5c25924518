"""The settings of the loop, measured once on a machine."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flash_loops import OTHERS, make_flash
from mlx_flashhead import get_flash_head
from mlx_flashhead.head.flash_head import MOST_RISK
from mlx_flashhead.loading import tuned
from mlx_flashhead.loading.attach import install_stored
from mlx_flashhead.loading.sources import HeadOptions, StoredHead
from mlx_flashhead.lossless import tuning as tuning_module
from mlx_flashhead.lossless.tuning import Tuning, expected_seconds, tune
from tiny_models import tiny_index, tiny_model

FAST = Tuning(2, 1e30, 8, 0.07, 1.5, 0.01, 0.0, dense=False, checked_positions=5)
SLOW = Tuning(3, 1e30, 16, 0.02, 1.01, 0.01, 0.0, dense=True)


@pytest.fixture
def measure(monkeypatch):
    """What is measured, in turn; a further measurement fails."""
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")

    def set_results(*results):
        left = list(results)

        def tune(model, differences):
            yield
            return left.pop(0)

        monkeypatch.setattr(tuned, "tune", tune)
        return left

    return set_results


def loaded(**options):
    """A model with its FlashHead, as at a load."""
    model = tiny_model()
    index = tiny_index(model, n_probes=4)
    said = []
    choices = HeadOptions(**options)
    object.__setattr__(choices, "say", said.append)
    install_stored(model, StoredHead(index, "here"), choices)
    return get_flash_head(model), said


def measured(*arguments, between=lambda: None, **options):
    """What a tuning finds, when all its steps are taken."""
    steps = tune(*arguments, **options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        between()


def test_it_is_measured_once(measure, flash_head_home):
    left = measure(FAST)
    for expected in ([tuned.MEASURING], []):
        head, said = loaded()
        assert (head.checked_probes, head.most_waiting, head.most_risk) == (2, 8, 0.07)
        assert head.checked_positions == 5
        assert not head.stays_dense
        assert head.n_probes == 4 and said == expected
    assert not left


def test_a_head_that_gains_nothing_stays_dense_and_says_so(measure, flash_head_home):
    measure(SLOW)
    head, said = loaded()
    assert head.stays_dense
    _, sentence = said
    assert "would not make this model faster on this machine (1.01 x" in sentence
    assert "it stays dense" in sentence
    assert loaded()[1] == []
    assert not loaded(always=True)[0].stays_dense


def test_a_busy_machine_is_measured_until_it_is_quiet(measure, monkeypatch, flash_head_home):
    noisy = replace(SLOW, spread=0.5, **{tuned.PROVISIONAL: True})
    left = measure(FAST, noisy, replace(noisy, spread=0.7), replace(FAST, spread=0.4))
    monkeypatch.setattr(tuned, "is_busy", lambda: True)
    assert not loaded()[0].stays_dense  # measured, since nothing is known
    loaded()
    assert len(left) == 3
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    assert not loaded()[0].stays_dense  # the steadier measurement stays
    assert not loaded()[0].stays_dense
    assert not loaded()[0].stays_dense and not left
    loaded()  # not provisional any more


def test_slower_on_a_busy_machine_is_said_so(measure, monkeypatch, flash_head_home):
    measure(SLOW, FAST)
    monkeypatch.setattr(tuned, "is_busy", lambda: True)
    head, (_, sentence) = loaded()
    assert head.stays_dense and "stays dense for now, and is measured again later" in sentence
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    assert not loaded()[0].stays_dense


def test_a_chosen_number_of_probes_stays(measure, flash_head_home):
    measure()
    head, _ = loaded(n_probes=3)
    assert (head.checked_probes, head.stays_dense) == (3, False)


WRONG = [None, "x", -1, 0, 1.5, 1e999, float("nan"), True, [1], {}, 10**400]


def test_a_damaged_file_is_measured_again(measure, monkeypatch, flash_head_home):
    """Each field wrong in turn, and files of other forms."""
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    left = measure(*[FAST] * 1000)
    loaded()
    (place,) = flash_head_home.glob("speeds/*.json")
    good = json.loads(place.read_text())
    ((key, values),) = good.items()
    texts = ["", "[1]", '{"x": 3}', '{"x": {"gain": 2}}', "[" * 100_000, "null", "{}x", "\ud800"]
    for name, value in values.items():
        texts += [json.dumps({key: values | {name: wrong}}) for wrong in WRONG if wrong != value]
        texts.append(json.dumps({key: {n: v for n, v in values.items() if n != name}}))
    for text in texts:
        place.write_bytes(text.encode("utf-8", "surrogatepass"))
        usable, before = tuned.read(place), len(left)
        head, said = loaded()
        assert head.checked_probes >= 1
        if not usable:
            assert said[0].startswith(f"{place} is damaged or of another version: ")
        assert before > len(left) or usable  # a value that could have been measured


def test_a_measurement_chooses_and_changes_no_text():
    flash = make_flash()
    before = flash.tokens()
    shares = [{"n_probes": n, "greedy_differs": s} for n, s in ((1, 0.5), (3, 0.2), (13, 0.0))]
    texts = []
    found = measured(flash.model, shares, seconds=1.0, between=lambda: texts.append(flash.tokens()))
    assert len(texts) >= 6 and all(text == before for text in texts)
    assert found.n_probes in (1, 3, 13) and found.most_waiting in tuning_module.WAITING
    assert flash.head.most_risk == found.most_risk != MOST_RISK
    assert found.gain > 0 and found.dense == (found.gain < tuning_module.LEAST_GAIN)
    assert flash.head.stays_dense == found.dense
    for flash.head.most_risk in (0.0, 0.3):  # of no account for the text
        assert flash.tokens() == before
    flash.head.stays_dense = True
    assert flash.tokens() == before
    assert flash.tokens(dense=True) == before


@pytest.mark.parametrize("dense, most", [(1.0, 1), (10.0, 4), (25.0, 16), (1000.0, 32)])
@pytest.mark.parametrize("late", [False, True])
def test_texts_at_once_for_which_proposals_pay(monkeypatch, dense, most, late):
    """A proposal takes a second a row, its check half of one, and the dense product ``dense``."""
    flash, clock = make_flash(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds):
        clock[0] += seconds
        return mx.zeros(1)

    monkeypatch.setattr(flash.head, "propose", lambda hidden, _: takes(len(hidden)))
    monkeypatch.setattr(tuning_module, "dense_logits", lambda *_: takes(dense))
    end = -1.0 if late else 1e6
    found = tuning_module._Steps(flash.model).checked_positions(0.5, end)
    assert found == (None if late else most)


def test_texts_at_once_are_a_question_of_speed_alone():
    flash = make_flash()
    before = flash.batch(OTHERS, dense=True)[0]
    for flash.head.checked_positions in (None, 1, 2, 3):
        assert flash.batch(OTHERS)[0] == before


def test_slow_steps_are_measured_by_their_parts(monkeypatch):
    flash = make_flash()
    before = flash.tokens()
    monkeypatch.setattr(tuning_module._Steps, "turn", None)
    found = measured(flash.model, seconds=0.0)
    assert found.n_probes == flash.head.checked_probes and found.again
    assert found.dense == (found.gain < tuning_module.LEAST_GAIN) == flash.head.stays_dense
    assert flash.tokens() == before


@pytest.mark.parametrize("fixed", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("share", [0.001, 0.003, 0.01])
def test_the_threshold_of_risk_is_about_the_best(fixed, share):
    """Of lumpy risks, in rounds that are played; ``fixed`` is that of a check, in steps."""
    rng = np.random.default_rng(0)
    risks = np.minimum(rng.lognormal(sigma=2.0, size=30_000) * share / np.exp(2.0), 1)
    differs = rng.random(len(risks)) < risks

    def played(most_risk):
        steps = checks = confirmed = place = 0
        while place < len(risks) - 32:
            sums = np.cumsum(risks[place : place + 32])
            n = min(int(np.searchsorted(sums, most_risk)) + 1, 32)
            other = np.flatnonzero(differs[place : place + n])
            given = other[0] + 1 if len(other) else n
            steps, checks = steps + n + bool(len(other)), checks + 1
            confirmed, place = confirmed + given, place + given
        return (steps + fixed * checks) / confirmed

    checks = {k: fixed + 0.001 * k for k in tuning_module.WAITING}
    _, risk = expected_seconds(1.0, checks, risks.mean(), 32)
    best = min(map(played, np.geomspace(0.003, 0.5, 16)))
    assert played(risk) < 1.01 * best


def test_the_random_state_is_left_alone():
    flash = make_flash()
    mx.random.seed(5)
    before = mx.random.state[0].tolist()
    measured(flash.model, seconds=0.5)
    assert mx.random.state[0].tolist() == before
