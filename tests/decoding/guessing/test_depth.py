"""How many tokens a step takes: the formula, what is learned, and what guesses may lose."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils
from mlx_lm.models.cache import make_prompt_cache

from flash_loops import PROMPT
from mlx_flashhead.common.stored import store, stored
from mlx_flashhead.decoding.guessing import depth, guesses, known_pairs
from mlx_flashhead.decoding.guessing.depth import (
    BOUND,
    MAX_GUESSES,
    START,
    Budget,
    Costs,
    Known,
    Shares,
    best_width,
    gain,
)
from mlx_flashhead.decoding.guessing.guesser import Guess, Guesser, LatestToken, Offer
from mlx_flashhead.decoding.guessing.guesses import Guesses, best_offer
from mlx_flashhead.decoding.guessing.lookup import chances_behind
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.wide import store as store_of_trials
from mlx_flashhead.wide.step import Established, WideSteps, layout_of
from simulated_texts import drawn, time_of_policy, time_of_width
from tiny_models import tiny_model

# A large model on a small chip has such costs.
CHEAP = Costs({2: 1.06, 3: 1.2, 4: 1.4, 8: 2.4}, draft=0.05)
DEAR = Costs({2: 1.8, 3: 1.95, 4: 2.1, 8: 3.1}, draft=0.05, wrong=0.1)
HOPELESS = Costs({2: 2.2, 3: 3.2, 4: 4.2, 8: 8.2})


def test_the_gain_is_expected_tokens_for_expected_time():
    costs = Costs({2: 1.2, 4: 1.5}, draft=0.1, wrong=0.5)
    shares = [0.8, 0.5, 0.25, 0.1]
    assert gain(2, shares, costs) == pytest.approx(1.8 / (1.2 + 0.1 + 0.2 * 0.5))
    time = 1.5 + 3 * 0.1 + (1 - 0.1) * 0.5
    assert gain(4, shares, costs) == pytest.approx((1 + 0.8 + 0.4 + 0.1) / time)


def test_the_best_width():
    assert best_width([0.95] * 7, CHEAP) == 8
    assert best_width([0.8] * 7, CHEAP) == 4
    assert best_width([0.3] * 7, CHEAP) == 2
    assert best_width([0.05] * 7, CHEAP) == 1
    assert best_width([0.9] * 7, Costs({})) == 1
    # A step is no wider than it has guesses.
    assert best_width([0.95] * 3, CHEAP) == 4
    assert best_width([0.95] * 7, CHEAP._replace(draft=0.4)) < 8


def test_shares_are_those_of_the_text():
    learned = Shares(Known().shares)
    for _ in range(300):
        # Two are right, and the third is wrong.
        learned.note(3, 2)
    shares = learned.chances
    assert shares[1] >= shares[0] > 0.9
    assert shares[2] < 0.15
    # A depth that was never reached is as the one before.
    assert all(share <= shares[2] for share in shares[3:])


def test_a_depth_that_was_seldom_reached_falls_as_in_earlier_texts():
    known = Known()
    known.add([80, 40, 20, 10, 5, 2, 1], [100, 80, 40, 20, 10, 5, 2])
    assert known.shares[1] == pytest.approx(0.5, abs=0.02)
    learned = Shares(known.shares)
    for _ in range(300):
        learned.note(1, 1)
    shares = learned.chances
    assert shares[0] > 0.95
    assert shares[1] / shares[0] == pytest.approx(known.shares[1] / known.shares[0])


def test_what_is_known_is_kept_on_the_machine(tmp_path):
    known = Known()
    shares = Shares(known.shares)
    budget = Budget(known)
    for _ in range(50):
        shares.note(7, 3)
        budget.note(8, CHEAP, 3)
    shares.leave_to(known)
    assert known.tried[:4] == [50] * 4 and known.right[:4] == [50, 50, 50, 0]
    assert known.slack > START
    store(tmp_path / "known.json", {"a pair": known})
    assert stored(tmp_path / "known.json", Known) == {"a pair": known}
    for _ in range(1000):
        known.add([1.0] * 7, [1.0] * 7)
    assert known.tried == [depth.MOST_KNOWN] * 7 and known.shares[3] > 0.9


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_guesses_that_are_all_wrong_lose_little(costs):
    """Whatever is believed before: the slack bounds it."""
    known = Known(right=[400.0] * 7, tried=[400.0] * 7)
    runs = np.zeros(1000, int)
    lost = time_of_policy(runs, costs, known) - len(runs)
    assert 0 < lost <= START + BOUND * len(runs) + 1e-6
    lost += time_of_policy(runs, costs, known) - len(runs)
    assert lost <= START + 2 * BOUND * len(runs) + 1e-6


def test_what_cannot_pay_is_never_tried():
    known = Known(right=[400.0] * 7, tried=[400.0] * 7)
    runs = drawn([1.0] * 7, 500, 0)
    assert time_of_policy(runs, HOPELESS, known) == 500


def test_a_drafter_that_becomes_good_is_found_again():
    known = Known()
    runs = np.concatenate([np.zeros(400, int), drawn([0.9] * 7, 600, 1)])
    single = float(len(runs))
    assert time_of_policy(runs, CHEAP, known) < 0.75 * single


@pytest.mark.parametrize("share", [0.93, 0.8, 0.65, 0.5, 0.35, 0.2, 0.0])
@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_the_policy_is_about_as_fast_as_the_best_width(costs, share):
    """And as single steps, over texts of a pair of which nothing is known at first."""
    texts = [drawn([share] * 7, 250, seed) for seed in range(12)]
    known = Known()
    time = sum(time_of_policy(runs, costs, known) for runs in texts)

    def time_of(width):
        return sum(time_of_width(runs, costs, width) for runs in texts)

    assert time <= 1.02 * time_of(1)
    assert all(time <= 1.03 * time_of(width) for width in costs.times)


class Drafter(Guesser):
    """Guesses wherever it is asked."""

    name = "drafter"

    def __init__(self, known, cost=0.05):
        self.known = known
        self._shares = Shares(known.shares)
        self._cost = cost

    def offer(self, text, latest):
        return Offer(self, self._shares.chances, lambda n: mx.zeros(n, mx.uint32), self._cost)

    def judge(self, n, n_right):
        self._shares.note(n, n_right)


class Free(Drafter):
    """A lookup, which costs nothing and learns without being taken."""

    name = "free"
    known = None

    def __init__(self, chance):
        self._chance = chance

    def offer(self, text, latest):
        return Offer(self, [self._chance] * 7, lambda n: mx.zeros(n, mx.uint32))

    def judge(self, n, n_right):
        pass


def guesses_with(*guessers, always=False):
    parts = SimpleNamespace(are_of=lambda model: True)
    wide = SimpleNamespace(parts=parts, model=None, costs=lambda layers: dict(CHEAP.times))
    return Guesses(wide, guessers, always=always)


def steps_of(guesses, n_tokens, n_right):
    """The width of each step of a text, and the name of whoever guessed."""
    text = SimpleNamespace(recognised=True)
    steps = []
    place = 0
    while place < n_tokens:
        taken = guesses.best(text, LatestToken(mx.array([1])), [])
        accepted = 0
        if taken is not None:
            offer, n = taken
            accepted = min(n, n_right)
            guesses.judge(Guess(offer.guesser, offer.make(n)), accepted)
            steps.append((n + 1, offer.guesser.name))
        else:
            steps.append((1, None))
        place += accepted + 1
    return steps


def test_a_text_goes_by_the_budget():
    known = Known()
    steps = steps_of(guesses_with(Drafter(known)), 1000, 0)
    lost = sum(CHEAP.time(width) - 1 for width, _ in steps)
    assert 0 < lost <= START + BOUND * len(steps) + 1e-6
    assert known.slack < START
    widths = [width for width, _ in steps_of(guesses_with(Drafter(Known())), 1000, 7)]
    assert widths[-1] == 8 and len(widths) < 160
    always = guesses_with(Drafter(Known()), always=True)
    assert {width for width, _ in steps_of(always, 50, 0)} == {8}


def test_what_gains_most_goes_first():
    known = Known(right=[100.0] * 7, tried=[200.0] * 7, slack=8.0)
    steps = steps_of(guesses_with(Free(0.9), Drafter(known)), 200, 3)
    assert {name for _, name in steps} == {"free"}
    steps = steps_of(guesses_with(Free(0.1), Drafter(known)), 200, 3)
    assert steps[0][1] == "drafter"


def test_what_is_known_of_a_pair_is_read_again(tmp_path, monkeypatch):
    """By another process, whose objects are others; not with another drafter."""
    monkeypatch.setattr(known_pairs, "path_of", lambda model: tmp_path / f"{'a' * 24}.json")

    class Trained:
        def __init__(self, source):
            self.source = source

    monkeypatch.setattr(known_pairs, "TrainedDrafter", Trained)
    first = Trained("a drafter")
    model = Trained("")
    known = known_pairs.known_of(first, model)
    assert known == Known() and known_pairs.known_of(first, model) is known
    shares = Shares(known.shares)
    shares.note(7, 4)
    known.slack = 1.0
    known_pairs.keep(first, model, shares)
    assert known.right == [1.0] * 4 + [0.0] * 3 and known.tried == [1.0] * 5 + [0.0] * 2
    assert known_pairs.known_of(Trained("a drafter"), model) == known
    assert known_pairs.known_of(Trained("another"), model) == Known()
    (file,) = tmp_path.iterdir()
    file.write_text("{}}")
    assert known_pairs.known_of(Trained("a drafter"), model) == Known()


def test_what_is_known_of_a_small_model_is_its_own(tmp_path, monkeypatch):
    """It is told from others by what it holds, in another process, too."""
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING", raising=False)
    monkeypatch.setattr(store_of_trials, "home", lambda: tmp_path)
    target = tiny_model(num_hidden_layers=2)
    draft = tiny_model(num_hidden_layers=1, seed=3)
    known = known_pairs.known_of(draft, target)
    shares = Shares(known.shares)
    shares.note(3, 2)
    known_pairs.keep(draft, target, shares)
    again = tiny_model(num_hidden_layers=1, seed=3)
    assert known_pairs.known_of(again, target) == known != Known()
    assert known_pairs.known_of(tiny_model(num_hidden_layers=1, seed=4), target) == Known()
    assert known_pairs.known_of(draft, tiny_model(num_hidden_layers=2, seed=5)) == Known()


def test_guesses_that_do_not_pay_are_not_taken(monkeypatch):
    """As on a GPU: what is found decides, and what a step of several tokens costs."""
    monkeypatch.setattr(guesses, "gpu_is_default", lambda: True)
    model = tiny_model(num_hidden_layers=2)
    # The text is this token alone.
    forever = sample_utils.make_logits_processors({5: 100.0})
    n_steps = {}
    for cost in (1.01, 100.0):
        kind = layout_of(make_prompt_cache(model))
        WideSteps.of(model).established[kind] = Established({2: cost, 4: cost, 8: cost})
        proposer = Proposer(model)
        steps = verified_tokens(
            mx.array(PROMPT),
            model,
            proposer=proposer,
            logits_processors=forever,
            max_tokens=60,
        )
        assert [token for token, _ in steps] == [5] * 60
        n_steps[cost] = proposer.n_steps
    assert n_steps[1.01] < 20
    # All steps are single ones.
    assert n_steps[100.0] >= 59


@pytest.mark.parametrize(
    "notes, costs, width",
    [
        ([(3, False)] * 5, {2: 1.05, 4: 1.3, 8: 2.0}, 8),
        ([(3, False)] * 5, {2: 1.05, 4: 1.3, 8: 5.0}, 4),
        # a first guess is right, a second one never
        ([(1, True)] * 9, {2: 1.05, 4: 1.3, 8: 2.5}, 2),
        ([(0, True)] * 9, {2: 1.05, 4: 1.3, 8: 2.5}, 1),
        ([(0, True)] * 20 + [(3, False)] * 9, {2: 1.05, 4: 1.3}, 4),
        ([(3, False)] * 5, {}, 1),
    ],
)
def test_the_width_of_a_step_is_the_one_that_pays(notes, costs, width):
    shares = Shares([0.5] * MAX_GUESSES, 2.0)
    for n_right, wrong in notes:
        shares.note(n_right + wrong, n_right)
    offer = Offer(Guesser, shares.chances, mx.zeros)
    assert best_offer([offer], costs)[1] == width


def test_a_lookup_behind_an_unknown_token_is_as_long_as_another():
    """That token must be as found, too."""
    chances = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert chances_behind(chances, 0) == chances
    behind = chances_behind(chances, 1)
    assert behind == [pytest.approx(0.72), 0.7, 0.6, 0.5, 0.4, 0.3, 0.3]
    assert len(behind) == MAX_GUESSES
