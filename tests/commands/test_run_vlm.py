# ruff: noqa: E402 - without mlx-vlm all of this is skipped
"""``run``: programs of mlx-vlm with a FlashHead under its ``load``."""

import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_flashhead.index.files import write_companion
from model_folders import write_model
from run_programs import DENSE, MANY, alone, running_server, start_many
from tiny_models import tiny_index
from vlm_folders import write_picture, write_vision_model

WITH = "With FlashHead: model, 4 of 33 clusters scored per token."
# Takes load in two ways and prints the class of the head's layer.
TWO_MODELS = """
import mlx_lm
import mlx_vlm
from mlx_vlm.utils import load

head, embedding = "language_model.lm_head", "model.embed_tokens"
for function, folder in (load, "model"), (mlx_vlm.load, "model"), (mlx_lm.load, "text"):
    model, _ = function(folder)
    layer = dict(model.named_modules())[head if folder == "model" else embedding]
    print(type(layer).__mro__[1].__name__)
"""

TEXTS = """
import mlx.core as mx
import mlx_vlm

model, processor = mlx_vlm.load("model")
for options in {}, {"image": "picture.png"}, {"temperature": 0.8}, {"repetition_penalty": 1.3}:
    mx.random.seed(3)
    text = mlx_vlm.generate(model, processor, "What is it?", max_tokens=24, **options)
    print(ascii(text.text), text.generation_tokens)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, the FlashHead of one of them, a picture, and programs."""
    place = tmp_path_factory.mktemp("run_vlm")
    write_model(place / "text")
    model, _ = mlx_vlm.load(str(write_vision_model(place / "model")))
    (place / "head").mkdir()
    write_companion(place / "head", tiny_index(model))
    write_picture(place / "picture.png")
    (place / "no_picture.png").write_text("not a picture")
    for name, program in {"program": TWO_MODELS, "texts": TEXTS, "many": MANY}.items():
        (place / f"{name}.py").write_text(program)
    return place


def test_programs_of_mlx_vlm(place, capsys):
    """Greedy texts are verified, also after a picture; the others use the normal head. A picture
    that is none is the program's own affair."""
    words = "--model model --max-tokens 5"
    programs = [
        "program.py",
        "texts.py",
        f"-m mlx_vlm generate {words} --prompt What --image picture.png --verbose",
        f"-m mlx_vlm.chat {words}",
        f"-m mlx_vlm.generate {words} --prompt What --image no_picture.png",
    ]
    typed = "/image picture.png\nWhat is it?\n/exit\n"
    flags = ("--flash-head", "head")
    shown = start_many(place, *flags, "many.py", *programs, typed=typed, code=1)
    layers, said = shown.pop(0)
    assert layers.split() == ["FlashLinear", "FlashLinear", "Module"]
    # The FlashHead is of other rows.
    assert (said.count("With FlashHead"), said.count(DENSE)) == (2, 1)
    output, errors = zip(*shown, strict=True)
    assert output[0] == alone(capsys, place, "texts.py")
    assert len({*output[0].splitlines()}) > 2 and "Text of model: verified." in errors[0]
    assert "Generation:" in output[1] and "Assistant:" in output[2]
    assert [said.count(WITH) for said in errors] == [1] * 4 and DENSE not in "".join(errors)
    assert "Failed to load image from no_picture.png" in errors[3].strip().splitlines()[-1]


def test_the_server(place):
    """Several clients at once, with a picture and without; a broken picture spoils nothing."""
    arguments = ("-m", "mlx_vlm.server", "--model", "model")
    with running_server(place, *arguments, ready="Uvicorn running") as server:

        def ask(picture):
            content = [{"type": "text", "text": "What is it?"}]
            if picture:
                content.append({"type": "image_url", "image_url": {"url": str(place / picture)}})
            return server.ask(content, model="model", max_tokens=5, temperature=0)

        texts = {picture: ask(picture) for picture in ("picture.png", None)}
        with ThreadPoolExecutor(4) as pool:
            pictures = ["picture.png", None] * 3
            assert list(pool.map(ask, pictures)) == [texts[picture] for picture in pictures]
        with pytest.raises(urllib.error.HTTPError):
            ask("no_picture.png")
        assert ask(None) == texts[None]
    assert WITH in server.said and DENSE not in server.said
