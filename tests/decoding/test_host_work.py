"""What Python makes and calls for a token."""

import math
import sys

import mlx.core as mx
import mlx_lm.sample_utils
import pytest
from metal_emulator import Emulator

from flash_loops import flash_of
from kernel_cases import kernels, on_gpu
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.operations import NO_DEPTH
from tiny_models import tiny_model

pytestmark = [
    # The oldest environment has no compiler for the emulator.
    pytest.mark.newest,
    pytest.mark.skipif(on_gpu(), reason="kernels are counted on the emulator"),
]
N_TOKENS = 100


class Counted:
    """Counts arrays that the package makes from numbers, and calls of kernels and traced functions.

    What a traced function does counts as one call: MLX runs its Python code once.
    """

    def __init__(self, monkeypatch):
        # How many kernels and traced functions are being called.
        self.within = 0
        self.clear()
        array = mx.array
        run = Emulator._run
        counted = self

        class Meta(type):
            def __instancecheck__(cls, value):
                return isinstance(value, array)

            def __call__(cls, *given, **named):
                by_package = "/mlx_flashhead/" in sys._getframe(1).f_code.co_filename
                from_numbers = not isinstance(given[0], array)
                if by_package and from_numbers and counted.within == 0:
                    counted.arrays += 1
                return array(*given, **named)

        def called(emulator, *given, **named):
            if counted.within == 0:
                counted.kernels += 1
            # The emulator makes arrays, too.
            counted.within += 1
            try:
                return run(emulator, *given, **named)
            finally:
                counted.within -= 1

        monkeypatch.setattr(mx, "array", Meta("array", (), {}))
        monkeypatch.setattr(Emulator, "_run", called)

    def clear(self):
        """Counts anew."""
        self.arrays = 0
        self.kernels = 0
        self.traced = 0

    def compile(self, function, *_, **__):
        """Stands in for ``mx.compile``."""

        def traced(*given, **named):
            if self.within == 0:
                self.traced += 1
            self.within += 1
            try:
                return function(*given, **named)
            finally:
                self.within -= 1

        return traced


@pytest.mark.parametrize(
    "settings, n_arrays",
    [({}, 1), ({"temp": 0.7, "top_p": 0.95, "seed": 1}, 2)],
    ids=["greedy", "sampled"],
)
def test_a_token_takes_one_traced_call(monkeypatch, settings, n_arrays):
    with kernels(check=False):
        flash = flash_of(tiny_model(num_hidden_layers=2))
        policy = policy_of(flash.head)
        # All clusters are scored, so that nothing is rejected.
        policy.depth = NO_DEPTH
        # Verifications come by numbers of tokens.
        policy.max_wait = math.inf
        policy.max_risk = math.inf
        counted = Counted(monkeypatch)
        monkeypatch.setattr(mx, "compile", counted.compile)
        # The first text learns what the model does to its logits.
        for _ in range(2):
            counted.clear()
            steps = flash.steps(
                n_probes=flash.head.n_clusters,
                sampler=make_sampler(**settings),
                max_tokens=N_TOKENS,
                logprobs=False,
            )
            assert len(list(steps)) == N_TOKENS
    assert flash.head.backend == "metal"
    assert counted.traced <= N_TOKENS
    # These are the kernels of verifications.
    assert counted.kernels <= 0.4 * N_TOKENS
    assert counted.arrays <= n_arrays * N_TOKENS


class Calls:
    """Counts calls of the package's functions in a block, but for comprehensions.

    Newer versions of Python call no function for these.
    """

    def __init__(self):
        self.n = 0

    def note(self, frame, event, _):
        code = frame.f_code
        own = "/mlx_flashhead/" in code.co_filename and not code.co_name.startswith("<")
        if own and event == "call":
            self.n += 1

    def __enter__(self):
        self._before = sys.getprofile()
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(self._before)


@pytest.mark.parametrize(
    "sampler, most_calls",
    [
        (None, 82),
        (make_sampler(temp=0.7, top_p=0.95, seed=1), 105),
        (mlx_lm.sample_utils.make_sampler(temp=0.7, top_p=0.95), 109),
    ],
    ids=["greedy", "own", "mlx-lm's"],
)
def test_a_token_takes_few_calls(sampler, most_calls):
    flash = flash_of(tiny_model(num_hidden_layers=1))
    policy = policy_of(flash.head)
    # Verifications come by numbers of tokens.
    policy.lockstep = True
    policy.max_risk = math.inf
    # Nothing is rejected.
    flash.head.n_probes = flash.head.n_clusters
    n_tokens = 2 * N_TOKENS
    steps = flash.steps(sampler=sampler, max_tokens=2 * n_tokens, logprobs=False)
    for _ in range(n_tokens):
        next(steps)
    with Calls() as calls:
        for _ in range(n_tokens):
            next(steps)
    assert calls.n <= most_calls * n_tokens
