"""Tokens a step of a text that is guessed, and what they gain by the estimate."""

import json

import mlx.core as mx
import pytest

import guesses
import wide_times
from apple_estimates import README_CHIPS, README_DENSE, README_EXPERTS
from flash_loops import PROMPT
from guesses import Always, WherePaid, counted, replay, tasks
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.wide.step import MAX_WIDTH
from pages import CHECKOUT
from step_times import chips, dense_us, models
from tiny_models import tiny_model
from wide_times import lookup_gain


def test_a_copy_takes_whole_steps():
    """Once its first n-gram is known, each step has as many tokens as it may have."""
    prompt = [*range(10, 30)]
    answer = prompt[:19]
    # 10 is the prompt's, 11 and 12 come alone; from 13 on all are guessed.
    assert replay(prompt, answer, Always(4)) == (18, 2 + 4, {4: 4}, 12, 12)
    assert replay(prompt, answer, Always(2)) == (18, 2 + 8, {2: 8}, 8, 8)
    assert replay(prompt, answer, Always(4)).tokens_a_step == 3
    assert replay(prompt, answer, Always(4)).gain({4: 1.5}) == 18 / (2 + 4 * 1.5)


def test_a_step_that_waits_for_nothing_guesses_its_latest_token_too():
    """Behind a single step the n-gram before its token is looked up; behind a wide one with it."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 0]
    answer = [1, 2, 3, 9, 8, 8]
    # 2 and 3 alone; then 1, 2 are known and 3, 4, 5 expected: 9 comes instead of 4.
    assert replay(prompt, answer, Always(3)) == (5, 5, {3: 1}, 2, 0)


def test_wrong_guesses_cost_their_step_alone():
    """The step gives the text's own token where the guess is wrong."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 0]
    answer = [1, 2, 3, 4, 9, 8]
    # 2 and 3 alone, 4 as guessed with 9 behind it, 8 alone.
    steps = replay(prompt, answer, Always(4))
    assert steps == (5, 4, {4: 1}, 3, 1)
    assert steps.gain({4: 2.0}) == 1


def test_new_text_has_a_step_for_each_token():
    assert replay([1, 2, 3], [4, 5, 6, 7], Always(8)) == (3, 3, {}, 0, 0)


def test_guesses_that_do_not_pay_are_left_and_come_back():
    """Each guess is wrong at first, so that they end; later all are right."""
    costs = {2: 1.2, 4: 1.5}
    prompt = [token for i in range(40) for token in (1, 2, 100 + i, 200 + i)]
    wrong = [token for i in range(40) for token in (1, 2, 300 + i, 400 + i)]
    assert replay(prompt, wrong, Always(4)).wide == {4: 40}
    paid = replay(prompt, wrong, WherePaid(costs))
    assert sum(paid.wide.values()) < 4
    assert paid.gain(costs) > 0.98
    assert replay(prompt, [*wrong, *prompt], WherePaid(costs)).gain(costs) > 1.3


@pytest.mark.parametrize("n_tokens", [60, 100])
def test_the_steps_are_the_decoders(n_tokens):
    """A model with a few tokens to say repeats itself; the decoder launches one step more."""
    model = tiny_model(num_hidden_layers=1)
    model.model.embed_tokens.weight[9:] *= 0
    proposer = Proposer(model, DecodingSettings(lookup="on"))
    steps = verified_tokens(mx.array(PROMPT), model, proposer=proposer, max_tokens=n_tokens)
    text = [token for token, _ in steps]
    replayed = replay(PROMPT, text, Always(MAX_WIDTH))
    assert proposer.n_guessed.total() == replayed.accepted > 20
    assert proposer.n_steps - replayed.steps in (0, 1)


def test_the_figures_of_a_text():
    text = {"temperature": 0.7, "task": "quote", "kind": "repeats", "text": "…"}
    case = counted("a model", text | {"prompt": [1, 2, 3, 4, 5], "answer": [1, 2, 3, 4, 5]})
    assert json.loads(json.dumps(case)) == case
    four = case["widths"]["4"]
    assert (four["tokens"], four["steps"], four["wide"]) == (4, 3, 1)
    title, _, *lines = guesses.page_lines([case])
    assert title == "| task | a model, 0.7 |"
    assert lines == ["| quote | 1.33 / 1.33 / 1.33 |"]


def test_each_task_is_of_a_kind_and_asks_for_something():
    found = tasks()
    assert len({task["name"] for task in found}) == len(found)
    for task in found:
        assert task["kind"] in ("repeats", "partly", "new")
        assert task["request"].strip()


def test_a_wide_step_costs_no_less_than_a_single_one_and_grows_with_its_tokens():
    for model in ("gemma-3-4b", "gpt-oss-20b", "llama-3.1-8b"):
        for chip in ("m1", "m4", "m5-max"):
            costs = [wide_times.cost(model, chip, 4, width) for width in (2, 4, 8)]
            assert 1 < costs[0] < costs[1] < costs[2] <= 8


@pytest.mark.parametrize(
    "chip, width, published",
    [("m4-pro", 2, 1.01), ("m4-pro", 4, 1.47), ("m4-pro", 8, 2.69), ("m3-max", 8, 2.50)],
)
def test_products_are_near_those_that_others_measured(chip, width, published):
    """MLX's own kernel for several states, which reads the weights once as well: mlx 3839, 3863."""
    single = wide_times.product_us(chips()[chip], 1e8, 4, 1)
    several = wide_times.product_us(chips()[chip], 1e8, 4, width)
    assert several / single == pytest.approx(published, rel=0.07)


@pytest.mark.parametrize("width, published", [(2, 1.28), (4, 1.91), (9, 3.41)])
def test_a_mixtures_step_is_near_the_one_that_was_measured(width, published):
    """Qwen3.6-35B-A3B on an M1 Max, whose host takes little: qwisp 90."""
    of = models()["qwen3.5-35b-a3b"], chips()["m1-max"], 4, 4
    single = dense_us(*of)
    wide = wide_times.wide_device_us(*of, width, context=0)
    assert wide / single == pytest.approx(published, rel=0.1)


def test_experts_are_read_for_each_token():
    model = models()["gpt-oss-20b"]
    chip = chips()["m4"]
    more = wide_times.wide_body_us(model, chip, 4, 2) - wide_times.wide_body_us(model, chip, 4, 1)
    experts = wide_times.experts_us(model, chip, 4)
    assert more >= experts > 0


def test_a_window_past_its_end_and_long_caches_cost():
    of = models()["gemma-3-4b"], chips()["m4"], 4
    within = [wide_times.wide_body_us(*of, width, context=1024) for width in (1, 4)]
    past = [wide_times.wide_body_us(*of, width, context=1025) for width in (1, 4)]
    # Keys and values of 29 layers: read and written for each token.
    copied = of[1].us(2 * 29 * 1024 * 2 * 2048)
    launches = wide_times.COPY_LAUNCHES * 29 * of[1].launch_us
    for width, before, after in zip((1, 4), within, past, strict=True):
        assert after - before == pytest.approx(width * (copied + launches), rel=0.01)
    llama = models()["llama-3.1-8b"], chips()["m4"], 4
    more = [
        wide_times.wide_body_us(*llama, width, context=1000)
        - wide_times.wide_body_us(*llama, width, context=0)
        for width in (1, 4)
    ]
    assert more[0] == pytest.approx(llama[1].us(1000 * 32 * 2 * 1024 * 2))
    assert more[1] == pytest.approx(4 * more[0])


def test_a_partly_wrong_guess_makes_states_anew_and_reads_no_weight():
    chip = chips()["m4"]
    assert wide_times.wrong_us(models()["llama-3.1-8b"], chip) == 0
    model = models()["qwen3.5-4b"]
    states = chip.us(2 * 4 * 24 * 32 * 128 * 128)
    launches = 24 * wide_times.STATE_LAUNCHES * (chip.launch_us + chip.host_us)
    assert wide_times.wrong_us(model, chip) == pytest.approx(states + launches)
    assert wide_times.wrong_us(model, chip) < 0.1 * wide_times.single_us(model, chip, 4, 4)


def test_a_width_that_cannot_pay_is_not_counted():
    """Two tokens of a mixture on an M3 Ultra, which `auto` never takes."""
    for model in ("gemma-4-26b-a4b", "qwen3.5-35b-a3b"):
        assert wide_times.cost(model, "m3-ultra", 4, 2) > 2
    of = models()["gemma-4-26b-a4b"], chips()["m3-ultra"], 4, 4
    alone = dense_us(*of, context=wide_times.CONTEXT) / wide_times.single_us(*of)
    assert lookup_gain("gemma-4-26b-a4b", "m3-ultra", 4) == alone


def ends(values):
    return f"{min(values):.1f} to {max(values):.1f}"


def test_the_pages_quote_these_figures():
    comparison = (CHECKOUT / "docs" / "comparison.md").read_text(encoding="utf-8")
    speed = " ".join((CHECKOUT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    cases = json.loads(wide_times.FIGURES.read_text(encoding="utf-8"))["cases"]
    gains = {}
    for kind in ("repeats", "partly", "new"):
        found = [c for c in cases if (c["model"], c["kind"]) == (wide_times.MODEL, kind)]
        at_four = ends([case["widths"]["4"]["tokens_a_step"] for case in found])
        assert at_four in comparison, kind
        gains[kind] = [case["where_paid"]["gain"] for case in found]
    assert f"{ends(gains['repeats'])} times where they repeat the prompt" in speed
    assert "{:.2f} to {:.2f} times".format(min(gains["new"]), max(gains["new"])) in speed
    slowest = min(case["where_paid"]["gain"] for case in cases)
    assert f"The slowest of all texts has {slowest:.3f}" in speed
    for named in (README_DENSE, README_EXPERTS):
        gains = [lookup_gain(model, chip, 4) for model in named for chip in README_CHIPS]
        assert f"{min(gains):.2f} to {max(gains):.2f}" in comparison
