"""Models with states, whose layers have Metal kernels of mlx-lm's own: guesses change no text."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step

from architecture_models import tiny_architecture
from flash_loops import PROMPT, flash_of
from mlx_flashhead.decoding.loop import verified_tokens
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.wide import trial
from mlx_flashhead.wide.step import WideSteps

# The oldest environment has no compiler for the emulator.
pytestmark = pytest.mark.newest
N_TOKENS = 12
# The kernel takes heads of 32 columns and more.
HEADS = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
CASES = {"qwen3_5": ("gated_delta_step", HEADS), "granitemoehybrid": ("ssm_kernel", {})}


def plain_tokens(model, prompt):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=N_TOKENS)]


@pytest.mark.parametrize("name", CASES)
def test_wide_steps_of_layers_with_kernels_of_mlx_lm(gpu, name, kernels, monkeypatch):
    kernel, changes = CASES[name]
    model = tiny_architecture(name, tied=True, **changes)

    def is_wide(_, layer):
        return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0

    nn.quantize(model, 32, 4, class_predicate=is_wide)
    mx.eval(model.parameters())
    flash = flash_of(copy.deepcopy(model)).model
    prompt = [*PROMPT, *plain_tokens(model, PROMPT), *PROMPT]
    expected = plain_tokens(model, prompt)
    widths = []
    feed = WideSteps.feed

    def noted(self, tokens, caches):
        widths.append(tokens.shape[1])
        return feed(self, tokens, caches)

    monkeypatch.setattr(trial, "LONG", (30, 60))
    monkeypatch.setattr(WideSteps, "feed", noted)
    proposer = Proposer(flash, DecodingSettings(lookup="on"))
    options = {"proposer": proposer, "max_tokens": N_TOKENS}
    assert [token for token, _ in verified_tokens(mx.array(prompt), flash, **options)] == expected
    assert widths and (kernels() is None or kernel in kernels())
