"""A FlashHead that is built beside the use of its model."""

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx_lm
import pytest

from mlx_flashhead import get_flash_head, stream_generate
from mlx_flashhead.decoding.policy import Tuning, policy_of
from mlx_flashhead.loading import build_parts, builds, tuned
from mlx_flashhead.loading import cached as cache
from mlx_flashhead.loading.builds import build_beside, build_now
from mlx_flashhead.loading.head_options import HeadOptions
from model_folders import write_model

OPTIONS = HeadOptions(progress=False, tunes=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("background") / "model")


@pytest.fixture
def loaded(folder, quick):
    return mlx_lm.load(str(folder))


class Gate:
    """Lets the parts of a build through one by one, from the test's thread."""

    def __init__(self):
        self.n_let = 0
        self.build = None

    def __call__(self):
        if not self.n_let:
            return False
        self.n_let -= 1
        return True

    def let(self, n=1):
        """Lets n parts through; whether the build goes on after them."""
        self.n_let = n
        while self.n_let and not self.build.has_ended:
            time.sleep(0.001)
        return not self.build.has_ended


@pytest.fixture
def build_of():
    """A function: model, tokenizer, options → a build, whose gate lets parts through by and by."""
    builds = []

    def build_of(model, tokenizer, options=OPTIONS, gate=None):
        if gate is None:
            gate = Gate()
        build = build_beside(model, tokenizer, Path("model"), options, gate)
        if build is not None:
            gate.build = build
            builds.append(build)
        return build

    yield build_of
    for build in builds:
        build.leave()


def tokens(model, tokenizer, prompt="One day", n=8):
    stream = stream_generate(model, tokenizer, prompt, max_tokens=n)
    return [response.token for response in stream]


def test_text_before_between_and_after_is_the_dense_models(loaded, build_of):
    model, tokenizer = loaded
    dense = tokens(model, tokenizer)
    build = build_of(model, tokenizer)
    n_parts = 1
    while build.gate.let():
        n_parts += 1
        if n_parts % 7 == 0:
            assert build.take_over(model) is None
            assert tokens(model, tokenizer) == dense
    assert n_parts > 10 and get_flash_head(model) is None
    assert build.take_over(model) is get_flash_head(model) is not None
    assert tokens(model, tokenizer, n=20)[:8] == dense
    assert len(cache.entries()) == 1 and build_of(model, tokenizer) is None


@pytest.mark.parametrize("beside", [True, False])
def test_a_build_beside_leaves_a_processor_to_others(loaded, build_of, monkeypatch, beside):
    """Only while it builds: its speed is measured as a text is written."""
    leaves_one = False
    of_building = []
    of_measuring = []
    parts = builds.build_parts

    @contextmanager
    def one_thread_less():
        nonlocal leaves_one
        leaves_one = True
        yield
        leaves_one = False

    def built(*arguments, **options):
        stored = yield from noted(parts(*arguments, **options), of_building)
        return stored

    def noted(steps, seen):
        while True:
            seen.append(leaves_one)
            try:
                yield next(steps)
            except StopIteration as end:
                return end.value

    def tune(*_):
        yield from noted(iter([None]), of_measuring)

    monkeypatch.setattr(builds, "one_thread_less", one_thread_less)
    monkeypatch.setattr(builds, "build_parts", built)
    monkeypatch.setattr(builds, "tune_head", tune)
    if beside:
        build = build_of(*loaded)
        while build.gate.let():
            pass
    else:
        build_now(*loaded, Path("model"), OPTIONS)
    # The first part says how long it takes, before there is a thread.
    assert len(of_building) > 10 and set(of_building[1:]) == {beside}
    assert not any(of_measuring) and bool(of_measuring) == beside


@pytest.mark.parametrize("tunes", [True, False])
def test_what_takes_seconds_is_announced(loaded, monkeypatch, tunes):
    def tune(*_):
        yield
        return Tuning(gain=1.5, sampled_gain=1.5, dense_seconds=0.01)

    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    options = HeadOptions(progress=False, tunes=tunes)
    said = []
    object.__setattr__(options, "say", said.append)
    build_now(*loaded, Path("model"), options)
    building, *measuring, ready = said
    assert "Building the FlashHead" in building and "FlashHead is ready" in ready
    if tunes:
        assert [sentence[:9] for sentence in measuring] == ["Measuring", "FlashHead"]
        assert "makes this model 1.50 times as fast here" in measuring[1]
    else:
        assert measuring == []


@pytest.mark.parametrize("seconds, size", [(299, 16), (301, 32)])
def test_a_build_that_would_take_long_is_a_shorter_one(loaded, monkeypatch, seconds, size):
    monkeypatch.setattr(build_parts, "expected_seconds", lambda rows, options: {"all": seconds})
    build_now(*loaded, Path("model"), OPTIONS)
    head = get_flash_head(loaded[0])
    assert head.clustered.cluster_size == size


def test_a_build_goes_on_from_where_it_was_left(loaded, build_of, monkeypatch, flash_head_home):
    """Wherever it is left, what is done again is less, and the FlashHead is the same."""
    model, tokenizer = loaded
    whole = build_of(model, tokenizer)
    n_parts = 1
    while whole.gate.let():
        n_parts += 1
    expected = whole.stored.index
    (entry,) = cache.entries()
    entry.remove()
    said = []
    n_again = 0
    left = True
    while left:
        build = build_of(model, tokenizer, replace(OPTIONS, progress=True, tell=said.append))
        left = build.gate.let(n_parts * 2 // 3) and n_again < 20
        n_again += 1
        build.leave()
        assert bool(cache.entries()) == (build.stored is not None)
        assert build.stored is not None or len([*flash_head_home.glob("unfinished/*")]) == 1
    assert 2 <= n_again < 20
    assert said[0].startswith("Building the FlashHead") and said[-1].startswith("Going on with")
    index = build.stored.index
    assert not [*flash_head_home.glob("unfinished/*")]
    assert (index.token_ids == expected.token_ids).all()
    assert index.config.n_probes == expected.config.n_probes


def test_what_is_kept_and_damaged_is_computed_again(loaded, build_of, flash_head_home):
    model, tokenizer = loaded
    for n_bytes, more in ((0, b""), (0, b"PK\x03\x04"), (100, b"")):
        build = build_of(model, tokenizer)
        for _ in range(1000):
            if not build.gate.let() or [*flash_head_home.glob("unfinished/*/clusters.npz")]:
                break
        build.leave()
        for file in flash_head_home.glob("unfinished/*/*"):
            damaged = file.read_bytes()[:n_bytes] + more
            file.write_bytes(damaged)
    build_now(model, tokenizer, Path("model"), OPTIONS)
    assert get_flash_head(model) is not None


def test_what_unfinished_builds_keep_is_bounded(tmp_path):
    places = [tmp_path / "unfinished" / f"{i}" for i in range(9)]
    for i, place in enumerate(places):
        build_parts._begin(place, build_parts.IndexOptions())
        os.utime(place, (i, i))
    kept = {path.name for path in (tmp_path / "unfinished").iterdir()}
    assert kept == {"6", "7", "8"}


@pytest.mark.parametrize("dies", [False, True])
def test_another_process_builds(loaded, build_of, dies):
    """The second one takes what the first has built, or builds itself where that one has died: the
    lock of a file knows no process."""
    model, tokenizer = loaded
    other, _ = mlx_lm.load(str(tokenizer.name_or_path))
    first = build_of(model, tokenizer)
    second = build_of(other, tokenizer)
    assert first.gate.let()
    assert second.gate.let(5) and second.stored is None
    if dies:
        first.leave()
    while not dies and first.gate.let():
        pass
    n_parts = 0
    while second.gate.let():
        n_parts += 1
    assert second.take_over(other) is not None
    assert (n_parts > 10) == dies and len(cache.entries()) == 1


def test_a_thread_builds_while_nothing_is_written(loaded, build_of):
    model, tokenizer = loaded
    dense = tokens(model, tokenizer)
    build = build_of(model, tokenizer)
    writes = False
    build.gate = lambda: not writes
    seen = []
    while build.under_way and len(seen) < 1000:
        writes = True
        build.take_over(model)
        seen.append(tokens(model, tokenizer))
        writes = False
        time.sleep(0.01)
    assert get_flash_head(model) is not None
    assert all(found == dense for found in seen)
    assert tokens(model, tokenizer) == dense
    assert "build" not in [thread.name for thread in threading.enumerate()]


def test_a_build_that_is_left_leaves_a_dense_model(loaded, build_of):
    build = build_of(*loaded)
    build.leave()
    assert not build.under_way and build.take_over(loaded[0]) is None
    assert get_flash_head(loaded[0]) is None


def test_one_sees_how_far_a_build_is(loaded, build_of):
    """What is done grows, and what is left ends; a build that goes on begins where it was."""
    model, tokenizer = loaded
    build = build_of(model, tokenizer)
    shares = []
    while build.gate.let() and build.forecast is not None:
        shares.append(build.forecast.share)
        if len(shares) == 40:
            break
    assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1
    assert "left" in builds.time_left(build.forecast)
    build.leave()
    again = build_of(model, tokenizer)
    again.gate.let(3)
    assert again.forecast.share > shares[0]


def test_what_was_measured_on_the_copy_counts_for_the_model(loaded, monkeypatch, build_of):
    model, tokenizer = loaded

    def tune(*_):
        yield
        return Tuning(gain=0.9, sampled_gain=0.8, dense_seconds=0.1)

    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    options = HeadOptions(progress=False)
    build = build_of(model, tokenizer, options)
    while build.gate.let():
        pass
    monkeypatch.setattr(tuned, "tune", lambda *_: pytest.fail("measured again"))
    assert policy_of(build.take_over(model)).dense
