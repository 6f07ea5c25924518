"""A folder with a model and its FlashHead, under ``run`` and without it."""

import mlx_lm
import pytest

from mlx_flashhead.index.files import write_companion
from model_folders import write_model
from tiny_models import tiny_index
from under_run import OWN, Under, texts


@pytest.fixture(scope="module")
def program_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    model = write_model(folder / "model")
    (folder / "head").mkdir()
    write_companion(folder / "head", tiny_index(mlx_lm.load(str(model))[0]))
    return folder


@pytest.fixture
def under(program_folder):
    return Under(program_folder)


@pytest.fixture(scope="module")
def plain(program_folder):
    """The dense model, and its texts in a batch of mlx-lm."""
    model, tokenizer = mlx_lm.load(str(program_folder / "model"))
    prompts = [tokenizer.encode(f"{i} One day") for i in range(3)]
    return model, prompts, texts(OWN["BatchGenerator"](model), prompts)
