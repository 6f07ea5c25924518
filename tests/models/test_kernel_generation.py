"""The real model generates through the Metal kernels what it generates on the portable path.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels, on_gpu, to_numpy
from mlx_flashhead import detach, get_flash_head, stream_generate
from mlx_flashhead.conversion import take_all
from mlx_flashhead.conversion.build import build_index
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.exporting.plan import export_plan
from mlx_flashhead.head.steps import NO_DEPTH
from mlx_flashhead.lossless.policy import policy_of
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.locate import find_head, recorded_hidden
from plan_replay import read_plan, replay
from tiny_models import install_index

pytestmark = pytest.mark.real

N_PROBES = 96
MAX_TOKENS = 12
PROMPTS = [
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
]


@pytest.fixture(scope="module")
def real(real_model_folder):
    """The model without a FlashHead, its tokenizer, and an index without calibration."""
    model, tokenizer, _ = load_dense(real_model_folder)
    options = IndexOptions(n_probes=N_PROBES, quick=True)
    rows, eos_token_ids = find_head(model).rows(), tokenizer.eos_token_ids
    return model, tokenizer, take_all(build_index(rows, options, eos_token_ids=eos_token_ids))


def streamed(model, tokenizer, prompt) -> list[int]:
    """Greedy tokens."""
    answers = stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS)
    return [answer.token for answer in answers]


@pytest.fixture(scope="module")
def portable(real):
    """What the portable path generates from each prompt."""
    model, tokenizer, index = real
    install_index(model, index, backend="mlx")
    answers = [streamed(model, tokenizer, prompt) for prompt in PROMPTS]
    detach(model)
    return answers


@pytest.fixture
def on_kernels(real):
    """The model with the kernels installed, its tokenizer, and the emulator if there is one."""
    model, tokenizer, index = real
    with kernels() as emulator:
        install_index(model, index, backend="metal")
        assert get_flash_head(model).backend == "metal"
        if emulator is not None:
            emulator.dispatches.clear()  # those of the check on installation
        yield model, tokenizer, emulator
        detach(model)


@pytest.mark.parametrize("which, depth", [(0, NO_DEPTH), (1, 6.0)])
def test_proposals_give_the_same_tokens(on_kernels, portable, which, depth):
    model, tokenizer, emulator = on_kernels
    policy_of(get_flash_head(model)).depth = depth
    found = streamed(model, tokenizer, PROMPTS[which])
    assert found == portable[which]
    assert len(found) >= 8 and len(set(found)) > 4
    if not on_gpu():
        names = [dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches]
        assert set(names) >= {"route", "select", "score", "sample", "screen", "certain"}
        assert names.count("sample") >= len(found) - 1


def test_an_exported_plan_gives_the_same_logits(on_kernels, tmp_path):
    """From the rows in the model's own order, as an app has them."""
    model, tokenizer, _ = on_kernels
    head, location = get_flash_head(model), find_head(model)
    ids = mx.array(tokenizer.encode(PROMPTS[0]))[None]
    with recorded_hidden(location) as recorded, head.settings():
        expected = to_numpy(model(ids))[0]
    export_plan(head, location, tmp_path / "head.safetensors")
    arrays, plan = read_plan(tmp_path / "head.safetensors")
    found = replay(arrays, plan, head.clustered.token_rows(), recorded[0][0])
    np.testing.assert_array_equal(to_numpy(found), expected)
    assert plan["head"] == "model.embed_tokens"
