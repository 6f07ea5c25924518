"""Whether proposals pay is seen while a text runs, on a clock that is made up."""

import copy
import math

import mlx.core as mx
import pytest
from mlx_lm import sample_utils
from mlx_lm.generate import generate_step

from flash_loops import OTHERS, PROMPT, flash_of, make_flash
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.phase import SAMPLED_DENSE
from mlx_flashhead.decoding.policy import Pace, policy_of
from tiny_models import tiny_model

# A dense token takes so many seconds.
DENSE = 1.0


def seconds_of_text(pace, n_tokens, step, k, rejected_every):
    """The time of a text: proposals of ``step`` seconds, verified each ``k``, of which each
    ``rejected_every``-th verification rejects all but its first token."""
    total = 0.0
    made = 0
    since = 0
    verifications = 0
    while made < n_tokens:
        if pace.dense:
            total += DENSE
            made += 1
            pace.note_dense(DENSE)
            continue
        since += 1
        grown = 1
        verified = since == k
        if verified:
            verifications += 1
            since = 0
            if rejected_every and verifications % rejected_every == 0:
                # All but its first token are lost.
                grown = 2 - k
        total += step
        made += grown
        pace.note_proposed(step, grown, verified)
    return total


@pytest.mark.parametrize("known", [None, DENSE, 0.3 * DENSE])
@pytest.mark.parametrize("step, k, rejected_every", [(0.5, 8, 0), (0.5, 8, 3), (0.9, 4, 0)])
def test_proposals_that_pay_go_on(known, step, k, rejected_every):
    pace = Pace(known)
    whole = seconds_of_text(Pace(0.0), 0, step, k, 0)
    proposed = seconds_of_text(_always(), 3000, step, k, rejected_every)
    assert seconds_of_text(pace, 3000, step, k, rejected_every) < 1.04 * proposed + whole


def _always():
    """A pace that never says dense."""
    return Pace(math.inf)


@pytest.mark.parametrize("known", [None, DENSE])
@pytest.mark.parametrize("step, k, rejected_every", [(0.8, 4, 1), (2.0, 8, 0), (1.1, 8, 0)])
def test_text_whose_proposals_cost_more_is_never_much_slower(known, step, k, rejected_every):
    """Within 2 % of dense decoding, over the texts of a session, and it tries again."""
    phases = []

    class Counted(Pace):
        def _go_on_densely(self, n_tokens):
            super()._go_on_densely(n_tokens)
            phases.append(n_tokens)

    pace = Counted(known)
    total = 0.0
    for _ in range(20):
        total += seconds_of_text(pace, 500, step, k, rejected_every)
    assert total < 1.02 * 20 * 500 * DENSE
    assert len(phases) > 3 and max(phases) > 1000


@pytest.mark.parametrize("slower", [1.0, 1.5, 3.0])
def test_a_machine_that_has_become_slower_does_not_end_proposals(slower):
    """Dense tokens are timed again before many follow."""
    pace = Pace(DENSE)
    seconds = slower * DENSE
    proposed = seconds_of_text(_always(), 2000, 0.6 * seconds, 4, 0)
    total = 0.0
    made = 0
    while made < 2000:
        if pace.dense:
            total += seconds
            pace.note_dense(seconds)
        else:
            total += 0.6 * seconds
            pace.note_proposed(0.6 * seconds, 1, made % 4 == 3)
        made += 1
    assert total < 1.02 * proposed


def test_text_that_changes_is_proposed_again():
    pace = Pace(DENSE)
    seconds_of_text(pace, 1000, 0.8, 4, 1)
    assert pace.dense
    later = seconds_of_text(pace, 6000, 0.5, 8, 0)
    assert later < 0.8 * 6000 * DENSE


@pytest.mark.parametrize("settings", [None, {"temp": 1.0}], ids=["greedy", "drawn by mlx-lm"])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_the_text_is_the_same_through_all_changes(arch, settings, misses):
    """Dense phases begin and end at any token, and draws go on where they were."""
    window = {}
    if arch == "gemma3_text":
        window = {"sliding_window": 12, "sliding_window_pattern": 2, "num_hidden_layers": 2}
    dense = tiny_model(arch, **window)
    flash = flash_of(copy.deepcopy(dense))
    policy = policy_of(flash.head)
    policy.adapts = True
    phases = []

    class Slow(Pace):
        """A clock by which no proposal pays, and short dense phases."""

        def note_dense(self, seconds):
            super().note_dense(DENSE)

        def note_proposed(self, seconds, n_tokens, verified):
            super().note_proposed(2 * DENSE, n_tokens, verified)

        def _go_on_densely(self, n_tokens):
            super()._go_on_densely(5)
            phases.append(n_tokens)

    policy.paces = {(sampled, sampled, 1): Slow(DENSE) for sampled in (False, True)}
    sampler = None
    if settings is not None:
        sampler = sample_utils.make_sampler(**settings)
    mx.random.seed(3)
    expected = [
        t for t, _ in generate_step(mx.array(PROMPT), dense, max_tokens=90, sampler=sampler)
    ]
    state = mx.random.state[0].tolist()
    mx.random.seed(3)
    assert [t for t, _ in flash.steps(max_tokens=90, sampler=sampler)] == expected
    assert mx.random.state[0].tolist() == state
    assert len(phases) > 1
    # The choices of this gemma3_text are clear.
    assert misses or arch == "gemma3_text"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_sampled_text_that_was_measured_slower_is_dense_alone(dtype, misses):
    """Several are tried, but in 16 bits, where trying makes the dense steps of a batch dearer."""
    flash = make_flash(dtype=dtype, num_hidden_layers=2)
    policy = policy_of(flash.head)
    policy.sampled_dense = True
    policy.adapts = True
    settings = {"temp": 0.9, "seed": 3}
    said = set()
    text = flash.tokens(sampler=make_sampler(**settings), announce=said.add)
    assert said == {SAMPLED_DENSE}
    assert text == flash.tokens(dense=True, sampler=make_sampler(**settings))
    assert not misses
    assert flash.tokens() == flash.tokens(dense=True)
    # Greedy text goes on being proposed.
    assert misses
    misses.clear()
    samplers = [make_sampler(**settings | {"seed": seed}) for seed in range(3)]
    dense = flash.batch(OTHERS, dense=True, samplers=samplers)[0]
    samplers = [make_sampler(**settings | {"seed": seed}) for seed in range(3)]
    assert flash.batch(OTHERS, samplers=samplers)[0] == dense
    assert bool(misses) == (dtype == mx.float32)
