"""The settings of the loop, measured once on a machine."""

import json
from dataclasses import replace

import pytest
from mlx.utils import tree_flatten

from mlx_flashhead import get_flash_head
from mlx_flashhead.common.bars import Bar
from mlx_flashhead.decoding.measuring.tuning import LEAST_MEASUREMENTS
from mlx_flashhead.decoding.policy import Tuning, policy_of
from mlx_flashhead.loading import installing, tuned
from mlx_flashhead.loading.estimated_gain import free_head_gain
from mlx_flashhead.loading.gain_sentences import speed_text
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.loading.installing import install_stored
from mlx_flashhead.loading.sources import StoredHead
from mlx_flashhead.models.install import detach
from tiny_models import install_index, tiny_index, tiny_model

FAST = Tuning(gain=1.5, sampled_gain=1.7, dense_seconds=0.01)
SLOW = Tuning(gain=1.01, sampled_gain=0.9, dense_seconds=0.01)


@pytest.fixture
def measure(monkeypatch):
    """Sets what is measured, in turn; a further measurement fails. The machine is quiet."""
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    left = []

    def tune(model, rejected):
        yield
        return left.pop(0)

    monkeypatch.setattr(tuned, "tune", tune)

    def measure(*results):
        left.extend(results)
        return left

    return measure


@pytest.fixture(scope="module")
def dense():
    model = tiny_model()
    return model, StoredHead(tiny_index(model, n_probes=4), "here")


@pytest.fixture
def loaded(dense):
    """A function: options → a head, and what is said as its model is loaded."""

    def load(**options):
        model, stored = dense
        said = []
        choices = HeadOptions(**options)
        object.__setattr__(choices, "say", said.append)
        if get_flash_head(model) is not None:
            detach(model)
        return install_stored(model, stored, choices), said

    yield load
    detach(dense[0])


def test_it_is_measured_once(measure, loaded):
    left = measure(FAST)
    for n_said in (2, 0):
        head, said = loaded()
        policy = policy_of(head)
        assert policy.tuning == FAST and not policy.dense
        assert head.n_probes == head.unverified_probes == 4 and len(said) == n_said
    assert not left
    # A chosen number stays.
    assert loaded(n_probes=3)[0].n_probes == 3


def test_a_head_that_gains_nothing_stays_dense_and_says_so(measure, loaded):
    measure(SLOW)
    head, said = loaded()
    assert policy_of(head).dense
    _, sentence = said
    assert "would not make this model faster on this machine (1.01 x" in sentence
    assert "it stays dense. " in sentence
    assert loaded()[1] == []
    assert not policy_of(loaded(always=True)[0]).dense


def test_a_busy_machine_is_measured_until_it_is_quiet(measure, monkeypatch, loaded):
    left = measure(replace(FAST, busy=True), replace(FAST, busy=True), FAST)
    monkeypatch.setattr(tuned, "is_busy", lambda: True)
    # It is measured, since nothing is known.
    head, (_, sentence) = loaded()
    assert policy_of(head).dense
    assert "too busy to measure what FlashHead gains here: the model stays dense." in sentence
    assert "1.50" not in sentence
    loaded()
    assert len(left) == 2
    monkeypatch.setattr(tuned, "is_busy", lambda: False)
    assert policy_of(loaded()[0]).dense
    head, said = loaded()
    assert not policy_of(head).dense and not left
    assert "makes this model 1.50 times as fast here" in said[-1]
    # Nothing is measured again.
    loaded()


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("n_more", [0, 8])
def test_measuring_has_a_bar(loaded, monkeypatch, capsys, progress, n_more):
    """It ends full, also where turns disagree and more of them follow."""
    n_measurements = LEAST_MEASUREMENTS + n_more
    ends = []

    def tune(model, rejected):
        for _ in range(n_measurements):
            yield
        return FAST

    class Noted(Bar):
        def close(self):
            ends.append((self.n, self.total))
            super().close()

    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.setattr(installing, "Bar", Noted)
    _, said = loaded(progress=progress)
    assert installing.MEASURING in said
    shown = capsys.readouterr().err
    assert ("Measuring:   0%" in shown) == progress
    if progress:
        assert set(ends) == {(n_measurements, n_measurements)}


def test_measurements_belong_to_an_index(measure, dense, loaded, flash_head_home):
    """Another index of the same rows has settings of its own."""
    model, stored = dense
    left = measure(FAST, SLOW)
    assert policy_of(loaded()[0]).tuning == FAST
    detach(model)
    other = StoredHead(tiny_index(model, n_probes=5), "there")
    assert other.index.config.fingerprint == stored.index.config.fingerprint
    head = install_stored(model, other, HeadOptions(progress=False))
    assert policy_of(head).tuning == SLOW and not left
    # The tuning is as before.
    assert policy_of(loaded()[0]).tuning == FAST
    assert len([*flash_head_home.glob("speeds/*.json")]) == 2


def test_the_gain_of_a_free_head_counts_the_bytes_that_a_token_reads():
    for tied in (True, False):
        model = tiny_model(tied=tied)
        sizes = {path: array.nbytes for path, array in tree_flatten(model.parameters())}
        read = {name: size for name, size in sizes.items() if tied or "embed_tokens" not in name}
        # The largest read is that of the rows.
        head = max(read.values())
        expected = sum(read.values()) / (sum(read.values()) - head)
        # The padded slots count, too.
        assert free_head_gain_of(model) == pytest.approx(expected, rel=0.02)


def free_head_gain_of(model):
    install_index(model, tiny_index(model))
    return free_head_gain(model)


def test_what_limits_a_figure_is_said():
    assert speed_text(None) == "not known yet"
    assert speed_text(FAST) == "1.50 x"
    assert (
        speed_text(replace(FAST, busy=True)) == "not known yet (dense, since the machine was busy)"
    )
    assert speed_text(SLOW) == "1.01 x (dense)"


def test_nothing_is_compiled_or_measured_within_a_text(measure, loaded, monkeypatch):
    """Whoever loads the model, and whatever it gains: a request may choose its probes."""
    rehearsed = []
    monkeypatch.setattr(installing, "rehearse", rehearsed.append)
    measure(SLOW, FAST)
    for options in ({}, {"measures": True}, {"n_probes": 3}, {"tunes": False}, {"always": True}):
        rehearsed.clear()
        head, _ = loaded(**options)
        assert head._roundings and len(rehearsed) == 1
    head, _ = loaded(drafts=True)
    assert not head._roundings and len(rehearsed) == 1


WRONG = [None, "x", -1, 0, 1.5, 1e999, float("nan"), True, [1], {}, 10**400]


def test_a_damaged_file_is_measured_again(measure, loaded, flash_head_home):
    """Each field wrong in turn, and files of other forms."""
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
        usable = tuned.read(place)
        before = len(left)
        head, said = loaded()
        assert head.n_probes >= 1
        if not usable:
            assert said[0].startswith(f"{place} is damaged or of another version: ")
        # The value could have been measured.
        assert before > len(left) or usable
