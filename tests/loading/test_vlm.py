# ruff: noqa: E402 - without mlx-vlm all of this is skipped
"""A FlashHead on models that mlx-vlm has loaded, with pictures and without."""

import gc
import weakref

import mlx.nn as nn
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

import mlx_flashhead
from mlx_flashhead.conversion.pipeline import convert
from mlx_flashhead.index.files import write_companion
from mlx_flashhead.loading.load import attach
from mlx_flashhead.models.install import detach
from mlx_flashhead.models.vlm import ProcessorText, text_side
from model_folders import write_model
from tiny_models import parameters, tiny_index
from vlm_folders import MARKS, write_picture, write_vision_model

QUESTION = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A vision model, a picture, and a FlashHead of the model apart."""
    place = tmp_path_factory.mktemp("vlm")
    folder = write_vision_model(place / "model")
    write_picture(place / "picture.png")
    (place / "head").mkdir()
    write_companion(place / "head", tiny_index(mlx_vlm.load(str(folder))[0]))
    return place


@pytest.fixture
def loaded(place):
    return mlx_vlm.load(str(place / "model"))


def answer(model, processor, picture=None) -> str:
    """A greedy answer of mlx-vlm's own generation."""
    n_images = 0
    images = None
    if picture is not None:
        n_images = 1
        images = [str(picture)]
    prompt = mlx_vlm.apply_chat_template(processor, model.config, QUESTION, num_images=n_images)
    return mlx_vlm.generate(model, processor, prompt, image=images, max_tokens=9).text


@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "picture"])
def test_answers_are_the_dense_models(place, loaded, with_picture):
    picture = None
    if with_picture:
        picture = place / "picture.png"
    dense = answer(*loaded, picture)
    head = attach(*loaded, flash_head=place / "head")
    assert answer(*loaded, picture) == dense
    with head.settings():
        assert answer(*loaded, picture) != dense
    detach(loaded[0])
    assert answer(*loaded, picture) == dense


@pytest.mark.parametrize("tied", [False, True])
def test_a_finer_head_of_a_text_side(tmp_path, quick, tied):
    folder = write_vision_model(tmp_path / "model", tied=tied)
    model, processor = mlx_vlm.load(str(folder))
    nn.quantize(model.language_model, group_size=32, bits=4)
    before = parameters(model)
    head = attach(model, processor, fine_head=folder, progress=False)
    assert head.clustered.rows.bits == 8 and answer(model, processor)
    detach(model)
    assert parameters(model) == before


def test_it_is_built_at_first_use_and_cached(loaded, quick, monkeypatch, capfd):
    """Through the model's own chat template, without a picture's tokens."""
    model, processor = loaded
    seen = []
    original = ProcessorText.apply_chat_template

    def spy(self, *arguments, **options):
        found = original(self, *arguments, **options)
        if isinstance(found, list):
            seen.append(found)
        return found

    monkeypatch.setattr(ProcessorText, "apply_chat_template", spy)
    for builds in (True, False):
        attach(model, processor)
        assert ("Building the FlashHead of model" in capfd.readouterr().err) == builds
        detach(model)
    tokenizer = processor.tokenizer
    begins = tokenizer.encode("[user] ", add_special_tokens=False)
    assert len(seen) > 10 and all(ids[: len(begins)] == begins for ids in seen)
    assert not set(tokenizer.convert_tokens_to_ids(list(MARKS))) & {i for ids in seen for i in ids}
    text = mlx_vlm.apply_chat_template(processor, model.config, QUESTION)
    side = text_side(model, processor)
    assert side.apply_chat_template(QUESTION, True) == tokenizer.encode(text)
    assert side.eos_token_ids == [tokenizer.eos_token_id]


def test_converted_folder_loads(tmp_path):
    """Without the list of weights mlx-vlm loads each file that ends in .safetensors."""
    source = write_model(tmp_path / "source")
    folder = tmp_path / "converted"
    convert(str(source), str(folder), calibration="none", progress=False)
    dense = answer(*mlx_vlm.load(str(source)))
    for _ in range(2):
        model, tokenizer = mlx_vlm.load(str(folder))
        assert answer(model, tokenizer) == dense
        attach(model, tokenizer, folder)
        assert answer(model, tokenizer) == dense
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_generation_is_left_to_mlx_vlm_and_models_are_independent(place):
    first, second = (mlx_vlm.load(str(place / "model")) for _ in range(2))
    heads = [weakref.ref(attach(*both, flash_head=place / "head")) for both in (first, second)]
    assert answer(*first) == answer(*second)
    with pytest.raises(ValueError, match="already installed"):
        attach(*first, flash_head=place / "head")
    for function in (mlx_flashhead.generate, mlx_flashhead.batch_generate):
        with pytest.raises(ValueError, match=r"of mlx-vlm: generate with mlx_vlm.generate"):
            function(*first, "One day")
    del first
    gc.collect()
    assert [head() is None for head in heads] == [True, False]
