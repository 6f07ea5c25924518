# ruff: noqa: E402 - without mlx-vlm all of this is skipped
"""``run``: programs of mlx-vlm with a FlashHead under its ``load``."""

import json
import signal
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_flashhead.index.files import write_companion
from model_folders import write_model
from run_programs import DENSE, command, free_port, run
from tiny_models import tiny_index
from vlm_folders import write_picture, write_vision_model

WITH = "With FlashHead: model, 4 of 33 clusters scored per token."
# Takes load in two ways and asks the head's layer for its class.
TWO_MODELS = """
import sys
import mlx_lm
import mlx_vlm
from mlx_vlm.utils import load

for function, folder in zip((load, mlx_vlm.load, mlx_lm.load), sys.argv[1:]):
    model, _ = function(folder)
    layer = dict(model.named_modules())[sys.argv[4] if function is mlx_lm.load else sys.argv[5]]
    print(type(layer).__mro__[1].__name__)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models with their FlashHeads apart, a picture, and a program."""
    place = tmp_path_factory.mktemp("run_vlm")
    folders = write_vision_model(place / "model"), write_model(place / "text")
    for folder, head in zip(folders, ("head", "text_head"), strict=True):
        (place / head).mkdir()
        write_companion(place / head, tiny_index(mlx_vlm.load(str(folder))[0]))
    write_picture(place / "picture.png")
    (place / "no_picture.png").write_text("not a picture")
    (place / "program.py").write_text(TWO_MODELS)
    return place


@pytest.mark.parametrize("program", ["mlx_vlm.generate", "mlx_vlm"])
def test_generate(place, program):
    words = ["generate"] if program == "mlx_vlm" else []
    words += ["--model", "model", "--prompt", "What is it?", "--image", "picture.png"]
    code, output, errors = run(
        place, "--flash-head", "head", "-m", program, *words, "--max-tokens", 5, "--verbose"
    )
    assert code == 0, errors
    assert WITH in errors and DENSE not in errors
    assert "Generation: 5 tokens" in output or "Generation:" in output


def test_chat(place):
    code, output, errors = run(
        place, "--flash-head", "head", "-m", "mlx_vlm.chat", "--model", "model", "--max-tokens", 5,
        typed="/image picture.png\nWhat is it?\n/exit\n",
    )  # fmt: skip
    assert code == 0, errors
    assert WITH in errors and DENSE not in errors
    assert "Assistant:" in output


def test_dense_with_one_warning_where_there_is_none(place):
    words = ("--model", "model", "--prompt", "One", "--max-tokens", 3)
    code, _, errors = run(place, "--no-build", "-m", "mlx_vlm.generate", *words)
    assert code == 0
    assert errors.count(DENSE) == 1 and "There is no FlashHead of model yet" in errors


def test_a_picture_that_is_none_is_the_programs_affair(place):
    words = ("--model", "model", "--prompt", "What is it?", "--image", "no_picture.png")
    code, _, errors = run(place, "--flash-head", "head", "-m", "mlx_vlm.generate", *words)
    assert code == 1 and WITH in errors
    assert "Failed to load image from no_picture.png" in errors.strip().splitlines()[-1]


@pytest.mark.parametrize("head", ["head", "text_head"])
def test_two_models_of_two_libraries(place, head):
    """A given FlashHead is one model's. The others run dense, with one warning."""
    paths = ("model.embed_tokens", "language_model.lm_head")
    words = ("program.py", "model", "model", "text", *paths)
    code, output, errors = run(place, "--flash-head", head, *words)
    assert code == 0, errors
    served = ["_FlashLinear", "_FlashLinear", "Module"]
    assert output.split() == (served if head == "head" else ["Module", "Module", "_FlashEmbedding"])
    assert errors.count(DENSE) == 1
    assert errors.count("With FlashHead") == (2 if head == "head" else 1)


def test_the_server(place):
    """Several clients at once, with a picture and without; a broken picture spoils nothing."""
    port = free_port()
    words, environment = command(
        "--flash-head", "head", "-m", "mlx_vlm.server", "--model", "model", "--port", port
    )
    url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def ask(picture):
        content = [{"type": "text", "text": "What is it?"}]
        if picture:
            content.append({"type": "image_url", "image_url": {"url": str(place / picture)}})
        messages = [{"role": "user", "content": content}]
        body = {"model": "model", "messages": messages, "max_tokens": 5, "temperature": 0}
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    with subprocess.Popen(
        words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as server:  # fmt: skip
        try:
            said = ""
            while "Uvicorn running" not in said:
                line = server.stdout.readline()
                assert line, said
                said += line
            alone = {picture: ask(picture) for picture in ("picture.png", None)}
            with ThreadPoolExecutor(4) as pool:
                pictures = ["picture.png", None] * 3
                assert list(pool.map(ask, pictures)) == [alone[picture] for picture in pictures]
            with pytest.raises(urllib.error.HTTPError):
                ask("no_picture.png")
            assert ask(None) == alone[None]
        finally:
            server.send_signal(signal.SIGINT)
            said += server.communicate(timeout=60)[0]
    assert WITH in said and DENSE not in said
