"""The settings of the loop, measured once on a machine."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from flash_loops import make_flash
from mlx_flashhead import get_flash_head
from mlx_flashhead.loading import tuned
from mlx_flashhead.loading.attach import install_stored
from mlx_flashhead.loading.sources import HeadOptions, StoredHead
from mlx_flashhead.lossless.policy import policy_of
from mlx_flashhead.lossless.tuning import LEAST_GAIN, Tuning, tune
from tiny_models import tiny_index, tiny_model

FAST = Tuning(2, 1e30, 8, 0.07, 1.5, 0.01, 0.0, dense=False, max_batch=5)
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


def stays_dense(head):
    return policy_of(head).dense


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
        policy = policy_of(head)
        assert (head.n_probes, policy.max_pending, policy.max_risk) == (2, 8, 0.07)
        assert (policy.max_batch, policy.dense) == (5, False)
        assert head.unverified_probes == 4 and said == expected
    assert not left


def test_a_head_that_gains_nothing_stays_dense_and_says_so(measure, flash_head_home):
    measure(SLOW)
    head, said = loaded()
    assert stays_dense(head)
    _, sentence = said
    assert "would not make this model faster on this machine (1.01 x" in sentence
    assert "it stays dense" in sentence
    assert loaded()[1] == []
    assert not stays_dense(loaded(always=True)[0])


def test_a_busy_machine_is_measured_until_it_is_quiet(measure, monkeypatch, flash_head_home):
    noisy = replace(SLOW, spread=0.5, provisional=True)
    left = measure(FAST, noisy, replace(noisy, spread=0.7), replace(FAST, spread=0.4))
    monkeypatch.setattr(tuned, "is_busy", lambda: True)
    assert not stays_dense(loaded()[0])  # measured, since nothing is known
    loaded()
    assert len(left) == 3
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    assert not stays_dense(loaded()[0])  # the steadier measurement stays
    assert not stays_dense(loaded()[0])
    assert not stays_dense(loaded()[0]) and not left
    loaded()  # not provisional any more


def test_slower_on_a_busy_machine_is_said_so(measure, monkeypatch, flash_head_home):
    measure(SLOW, FAST)
    monkeypatch.setattr(tuned, "is_busy", lambda: True)
    head, (_, sentence) = loaded()
    assert stays_dense(head) and "stays dense for now, and is measured again later" in sentence
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    assert not stays_dense(loaded()[0])


def test_a_chosen_number_of_probes_stays(measure, flash_head_home):
    measure()
    head, _ = loaded(n_probes=3)
    assert (head.n_probes, stays_dense(head)) == (3, False)


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
        assert head.n_probes >= 1
        if not usable:
            assert said[0].startswith(f"{place} is damaged or of another version: ")
        assert before > len(left) or usable  # a value that could have been measured


def test_a_measurement_chooses_and_changes_no_text():
    flash = make_flash()
    before = flash.tokens()
    shares = [{"n_probes": n, "greedy_differs": s} for n, s in ((1, 0.5), (3, 0.2), (13, 0.0))]
    texts = []
    found = measured(flash.model, shares, seconds=1.0, between=lambda: texts.append(flash.tokens()))
    assert len(texts) >= 4 and all(text == before for text in texts)
    policy = policy_of(flash.head)
    assert flash.head.n_probes == found.n_probes and policy.max_risk == found.max_risk
    assert found.gain > 0 and found.dense == policy.dense == (found.gain < LEAST_GAIN)
    for policy.max_risk in (0.0, 0.3):  # of no account for the text
        assert flash.tokens() == before


def test_the_random_state_is_left_alone():
    flash = make_flash()
    mx.random.seed(5)
    before = mx.random.state[0].tolist()
    measured(flash.model, seconds=0.5)
    assert mx.random.state[0].tolist() == before
