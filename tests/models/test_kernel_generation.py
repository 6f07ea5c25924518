"""The real model generates through the Metal kernels what it generates on the portable path.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

import pytest

from kernel_cases import kernels, on_gpu
from mlx_flashhead import detach, get_flash_head, stream_generate
from mlx_flashhead.conversion import take_all
from mlx_flashhead.conversion.build import build_index
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.lossless.policy import policy_of
from mlx_flashhead.models.libraries import load_dense
from mlx_flashhead.models.locate import find_head
from tiny_models import install_index

pytestmark = pytest.mark.real

N_PROBES = 96
MAX_TOKENS = 9
PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return"
DEPTH = 6.0  # of the proposals, which leaves clusters out


def test_proposals_give_the_same_tokens(real_model_folder):
    model, tokenizer, _ = load_dense(real_model_folder)
    options = IndexOptions(n_probes=N_PROBES, quick=True)  # without calibration
    rows, eos_token_ids = find_head(model).rows(), tokenizer.eos_token_ids
    index = take_all(build_index(rows, options, eos_token_ids=eos_token_ids))

    def tokens(backend):
        install_index(model, index, backend=backend)
        assert get_flash_head(model).backend == backend
        policy_of(get_flash_head(model)).depth = DEPTH
        if backend == "metal" and emulator is not None:
            emulator.dispatches.clear()  # those of the check on installation
        answers = stream_generate(model, tokenizer, PROMPT, max_tokens=MAX_TOKENS)
        found = [answer.token for answer in answers]
        detach(model)
        return found

    portable = tokens("mlx")
    with kernels() as emulator:
        found = tokens("metal")
    assert found == portable
    assert len(found) >= 8 and len(set(found)) > 4
    if not on_gpu():
        names = [dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches]
        assert set(names) >= {"route", "select", "score", "sample", "screen", "certain"}
        assert names.count("sample") >= len(found) - 1
