"""Texts of a batch that mlx-lm's samplers draw, call by call beside mlx-lm's own batch."""

import copy
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from flash_loops import flash_of
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.phase import SEVERAL_DRAW, VERIFIED
from tiny_models import tiny_model

PROMPTS = [[5, 17, 3], [8], [1, 2, 3, 4, 5, 6, 7, 9], [60, 61], [11, 12, 13, 14, 15]]
SAMPLING = [
    {"temp": 0.7, "top_p": 0.9},
    {"temp": 1.0},
    {"temp": 1.2, "top_k": 5},
    {"temp": 0.9, "min_p": 0.1},
    {"temp": 1.0, "top_p": 0.95, "top_k": 20},
]
SHARED = "one sampler"
OWN = "a sampler each"
ONE_GREEDY = "a sampler each, one greedy"
ONE_UNKNOWN = "one a function that is not known, the others greedy"


@dataclass(frozen=True)
class Case:
    """A batch, and what happens to it before some calls: events of `Batch.happen` by the call."""

    samplers: str = SHARED
    n: int = 3
    limits: tuple[int, ...] = (24, 24, 24, 24, 24)
    stops: tuple[int, ...] = ()
    sizes: dict = field(default_factory=dict)
    penalty: float | None = None
    events: dict = field(default_factory=dict)


CASES = {
    "one text": Case(n=1),
    "one sampler": Case(),
    "one of two ends": Case(n=2, limits=(7, 24)),
    "ends at their own tokens": Case(n=5, stops=tuple(range(0, 200, 9))),
    "a sampler each": Case(OWN, n=4, limits=(24, 9, 15, 24)),
    "a sampler each, stops": Case(OWN, n=5, stops=tuple(range(1, 200, 9))),
    "one is greedy": Case(ONE_GREEDY, n=4, limits=(24, 24, 8, 24)),
    "one is greedy and ends": Case(ONE_GREEDY, n=3, limits=(5, 24, 24)),
    "one is greedy, stops": Case(ONE_GREEDY, n=4, stops=tuple(range(6, 200, 11))),
    "one is greedy, other stops": Case(ONE_GREEDY, n=5, stops=tuple(range(4, 200, 11))),
    "one is a function": Case(ONE_UNKNOWN, n=3, limits=(24, 9, 24), events={5: "insert"}),
    "a penalty": Case(n=3, penalty=1.2, limits=(24, 11, 24)),
    "one comes later": Case(n=2, events={6: "insert"}),
    "one comes later, each its own": Case(OWN, n=2, events={6: "insert", 13: "insert"}),
    "one comes to one": Case(n=1, events={9: "insert"}),
    "one is taken away": Case(n=4, events={5: "remove", 12: "remove"}),
    "a caller seeds": Case(n=3, events={7: "seed"}),
    "a caller seeds as one comes": Case(n=2, events={6: "insert and seed"}),
    "a caller draws": Case(OWN, n=3, events={7: "draw"}),
    "more than fit": Case(OWN, n=5, sizes={"completion_batch_size": 2, "prefill_batch_size": 1}),
    "more than fit, one greedy": Case(
        ONE_GREEDY, n=5, sizes={"completion_batch_size": 2, "prefill_batch_size": 1}
    ),
    "prompts in parts": Case(n=3, sizes={"prefill_step_size": 2}, events={4: "insert"}),
}


WINDOW = {"sliding_window": 12, "sliding_window_pattern": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models():
    dense = tiny_model("llama")
    return dense, flash_of(copy.deepcopy(dense)).model


@pytest.fixture(scope="module")
def rotating_models():
    dense = tiny_model("gemma3_text", **WINDOW)
    return dense, flash_of(copy.deepcopy(dense)).model


def second_best(logprobs):
    return mx.argsort(logprobs, axis=-1)[:, -2]


class Batch:
    """A generator with a case's texts."""

    def __init__(self, make, case):
        self.case = case
        self.generator = make(stop_tokens=[[token] for token in case.stops], **case.sizes)
        self.samplers = [make_sampler(**each) for each in SAMPLING]
        if case.samplers == SHARED:
            self.samplers = self.samplers[:1] * len(SAMPLING)
        elif case.samplers == ONE_GREEDY:
            self.samplers[0] = None
        elif case.samplers == ONE_UNKNOWN:
            self.samplers = [second_best, *[None] * (len(SAMPLING) - 1)]
        self.live = []
        self.n_inserted = 0

    def insert(self, n):
        rows = slice(self.n_inserted, self.n_inserted + n)
        processors = None
        if self.case.penalty is not None:
            processors = [make_logits_processors(repetition_penalty=self.case.penalty)] * n
        self.live += self.generator.insert(
            PROMPTS[rows],
            list(self.case.limits[rows]),
            samplers=self.samplers[rows],
            logits_processors=processors,
        )
        self.n_inserted += n

    def happen(self, event):
        if event in ("insert", "insert and seed"):
            self.insert(1)
        if event == "insert and seed":
            mx.random.seed(99)
        elif event == "remove":
            self.generator.remove([self.live.pop(0)])
        elif event == "seed":
            mx.random.seed(99)
        elif event == "draw":
            mx.eval(mx.random.uniform())


def run(make, case):
    """The tokens of each text, and MLX's random state after each call."""
    mx.random.seed(4)
    batch = Batch(make, case)
    batch.insert(case.n)
    tokens = {}
    states = []
    while True:
        batch.happen(case.events.get(len(states)))
        responses = batch.generator.next_generated()
        if not responses:
            return tokens, states
        for response in responses:
            tokens.setdefault(response.uid, []).append((response.token, response.finish_reason))
        ended = {response.uid for response in responses if response.finish_reason}
        batch.live = [uid for uid in batch.live if uid not in ended]
        states.append(mx.random.state[0].tolist())


def check(models, case, misses):
    dense, flash = models
    modes = []
    ours = partial(VerifiedBatchGenerator, flash, logprobs=False, announce=modes.append)
    found, states = run(ours, case)
    expected, expected_states = run(partial(BatchGenerator, dense), case)
    assert found == expected
    # Tokens beside greedy texts are handed out as soon as they can be.
    if case.samplers not in (ONE_GREEDY, ONE_UNKNOWN):
        assert states == expected_states
    assert case.n > 1 or VERIFIED in modes


@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_mlx_lms_batch(models, name, misses):
    check(models, CASES[name], misses)


@pytest.mark.parametrize("name", ["ends at their own tokens", "one comes later, each its own"])
def test_caches_that_rotate_go_back(rotating_models, name, misses):
    check(rotating_models, CASES[name], misses)


def test_one_text_that_draws_is_verified_until_another_one_comes(models):
    _, flash = models
    modes = []
    generator = VerifiedBatchGenerator(flash, logprobs=False, announce=modes.append)
    sampler = make_sampler(**SAMPLING[0])
    generator.insert(PROMPTS[:2], [40] * 2, samplers=[sampler, None])
    for _ in range(8):
        generator.next_generated()
    assert modes[-1] == VERIFIED
    modes.clear()
    (later,) = generator.insert([PROMPTS[2]], [12], samplers=[sampler])
    while later in generator.uids():
        generator.next_generated()
    assert SEVERAL_DRAW in modes
    modes.clear()
    while generator.next_generated():
        pass
    assert modes[-1] == VERIFIED
