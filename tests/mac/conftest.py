"""A pretended Mac, and models on it. On a machine with Metal its own GPU takes the same tests."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest

from mlx_flashhead.head import same_sums
from model_folders import write_model
from pretended_gpu import pretended_gpu
from tiny_models import install_index, tiny_index

# The chips differ most so: an M1 lacks bfloat16, and an M5 multiplies floats in TF32.
DTYPES = {"M1": mx.bfloat16, "M4": mx.bfloat16, "M5": mx.float32}


@pytest.fixture(scope="module", params=["M4"])
def gpu(request) -> Iterator[SimpleNamespace]:
    """The pretended GPU of a module: its chip, and the emulator with what has run on it."""
    with pretended_gpu(request.param) as emulator, pytest.MonkeyPatch.context() as patch:
        # So few logits of these small vocabularies show as much as a million of a real one.
        patch.setattr(same_sums, "ENOUGH_LOGITS", 600)
        yield SimpleNamespace(chip=request.param, emulator=emulator)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder of a 4-bit model in bfloat16, with a tokenizer."""
    place = tmp_path_factory.mktemp("mac")
    # Products of these widths have MLX's usual kernels.
    further = {"num_hidden_layers": 1}
    floats = write_model(place / "floats", hidden_size=256, dtype=mx.bfloat16, further=further)
    options = {"quantize": True, "q_bits": 4, "q_group_size": 64}
    mlx_lm.convert(str(floats), str(place / "model"), **options)
    return place / "model"


@pytest.fixture(scope="module")
def pair(gpu, folder) -> SimpleNamespace:
    """A model twice: plain, and with a FlashHead of random clusters, which is rejected often.

    Each is a pair of the model and its tokenizer.
    """

    def loaded():
        model, tokenizer = mlx_lm.load(str(folder))
        model.set_dtype(DTYPES[gpu.chip])
        return model, tokenizer

    plain = loaded()
    flash = loaded()
    install_index(flash[0], tiny_index(flash[0], n_probes=3))
    return SimpleNamespace(plain=plain, flash=flash)


@pytest.fixture
def kernels(gpu):
    """A function that names FlashHead's kernels that have run in the test; None on a real GPU."""
    if gpu.emulator is None:
        return lambda: None
    gpu.emulator.dispatches.clear()

    def names():
        return {each.name.removeprefix("flash_head_") for each in gpu.emulator.dispatches}

    return names
