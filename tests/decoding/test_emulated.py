"""The text is the dense model's on the Metal kernels, too.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

import mlx.core as mx
import pytest

from flash_loops import OTHERS, PROMPT, flash_of
from kernel_cases import kernels
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.operations import NO_DEPTH
from tiny_models import tiny_model

# The oldest environment has no compiler for the emulator.
pytestmark = pytest.mark.newest
SAMPLERS = {
    "greedy": {},
    "temperature": {"temp": 1.0, "seed": 1},
    "top-p": {"temp": 0.8, "top_p": 0.9, "seed": 2},
    "top-p and top-k": {"temp": 0.8, "top_p": 0.9, "top_k": 20, "seed": 3},
    "min-p": {"temp": 1.0, "min_p": 0.1, "seed": 4},
}


@pytest.fixture(scope="module")
def emulated():
    """A model of 4-bit rows in bfloat16 with the kernels installed, and the emulator."""
    with kernels(check=False) as emulator:
        flash = flash_of(tiny_model(dtype=mx.bfloat16, bits=4, num_hidden_layers=2))
        assert flash.head.backend == "metal"
        yield flash, emulator


@pytest.mark.parametrize("depth", [NO_DEPTH, 1.0])
@pytest.mark.parametrize("settings", SAMPLERS.values(), ids=SAMPLERS)
def test_one_text(emulated, monkeypatch, settings, depth, misses):
    """Whichever clusters are scored, and without logits of all tokens."""
    flash, emulator = emulated
    monkeypatch.setattr(policy_of(flash.head), "depth", depth)
    if emulator is not None:
        emulator.dispatches.clear()
    assert len(flash.checked(settings, max_tokens=16)) == 16 and misses
    if emulator is not None:
        names = {dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches}
        assert names >= {"route", "select", "score", "screen", "certain"} and "expand" not in names


def test_the_first_verification_comes_later_than_on_a_cpu(emulated):
    """An M1 or M2 multiplies up to five states one by one."""
    flash, _ = emulated
    portable = flash_of(tiny_model(num_hidden_layers=1))
    assert policy_of(flash.head).first_pending == 8
    assert portable.head.backend == "metal" or policy_of(portable.head).first_pending == 4


def test_texts_together(emulated, misses):
    flash, _ = emulated
    prompts = [PROMPT, *OTHERS]
    settings = list(SAMPLERS.values())[:4]

    def tokens(dense):
        samplers = [make_sampler(**each) for each in settings]
        return flash.batch(prompts, samplers=samplers, dense=dense)[0]

    assert tokens(dense=False) == tokens(dense=True) and misses
