"""``run``: other programs with a FlashHead under their ``mlx_lm.load``."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlx_lm
import pytest

from mlx_flashhead.index.files import write_companion
from model_folders import write_model
from run_programs import DENSE, command, free_port, run
from tiny_models import tiny_index

# A program that knows nothing of FlashHead, and that loads in three ways.
PROGRAM = """
import sys
from pathlib import Path
import mlx_lm
from mlx_lm.utils import load, load_model

for function in (load, mlx_lm.load, load_model):
    model, _ = function(Path(sys.argv[1]))
    print(type(model.model.embed_tokens).__mro__[1].__name__, __name__, *sys.argv[2:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its FlashHead apart, and a program."""
    place = tmp_path_factory.mktemp("run")
    model = write_model(place / "model")
    (place / "head").mkdir()
    write_companion(place / "head", tiny_index(mlx_lm.load(str(model))[0]))
    (place / "program.py").write_text(PROGRAM)
    return place


def test_a_program_and_its_arguments(place):
    code, output, errors = run(place, "--flash-head", "head", "program.py", "model", "--n-probes")
    assert code == 0, errors
    assert output.splitlines() == 3 * ["_FlashEmbedding __main__ --n-probes"]
    assert DENSE not in errors


def test_dense_with_one_warning_where_there_is_none(place):
    code, output, errors = run(place, "--no-build", "program.py", "model")
    assert code == 0
    assert output.splitlines() == 3 * ["Module __main__"]
    assert errors.count(DENSE) == 1 and "There is no FlashHead of model yet" in errors


def test_a_model_that_is_not_there_is_the_programs_affair(place):
    code, _, errors = run(place, "--no-build", "program.py", "./absent")
    assert code == 1 and "Traceback" in errors and DENSE not in errors


@pytest.mark.parametrize(
    "words, printed",
    [
        (("mlx_lm.generate", "--prompt", "One", "--max-tokens", 4), "Generation: 4 tokens"),
        (("mlx_lm.chat", "--max-tokens", 4), "chat"),  # 0.31 and 0.32 greet differently
        (("mlx_lm.benchmark", "-p", 8, "-g", 4, "-n", 1), "Averages: prompt_tps="),
        pytest.param(
            ("mlx_lm.perplexity", "--data-path", "data", "--sequence-length", 16, "--num-samples",
             2, "--batch-size", 1),
            "Perplexity: ",
            marks=pytest.mark.newest,  # it reads data by a package that the oldest has not
        ),
    ],
)  # fmt: skip
def test_programs_of_mlx_lm(place, words, printed):
    (place / "data").mkdir(exist_ok=True)
    (place / "data" / "train.jsonl").write_text(json.dumps({"text": "One day " * 9}) + "\n")
    code, output, errors = run(
        place, "--flash-head", "head", "-m", *words, "--model", "model", typed="One\nq\n"
    )
    assert code == 0, errors
    assert printed in output and DENSE not in errors


@pytest.mark.parametrize("draft", [(), ("--draft-model", "model")])
def test_text_of_mlx_lm_is_the_dense_models(place, draft):
    words = ("--model", "model", "--prompt", "One day", "--max-tokens", 24, *draft)
    code, output, errors = run(place, "--flash-head", "head", "-m", "mlx_lm.generate", *words)
    assert code == 0, errors
    dense = [sys.executable, "-m", "mlx_lm", "generate", *map(str, words[:6])]
    expected = subprocess.run(dense, cwd=place, capture_output=True, text=True).stdout
    assert output.split("=====")[2] == expected.split("=====")[2] != ""


TRAIN = [
    "--train",
    "--fine-tune-type",
    "lora",
    "--iters",
    "1",
    "--batch-size",
    "1",
    "--num-layers",
    "1",
    "--data",
    "data",
]


@pytest.mark.parametrize(
    "words",
    [
        ("mlx_lm.convert", "--hf-path", "model", "-q", "--q-group-size", 32, "--mlx-path", "out"),
        ("mlx_lm", "convert", "--hf-path", "model", "--mlx-path", "copy"),
        ("mlx_lm.lora", "--model", "model", *TRAIN),
    ],
)
def test_what_does_not_generate_gets_the_dense_model_silently(place, words):
    (place / "data").mkdir(exist_ok=True)
    for name in ("train", "valid"):
        lines = 2 * (json.dumps({"text": "One day " * 9}) + "\n")
        (place / "data" / f"{name}.jsonl").write_text(lines)
    code, _, errors = run(place, "--flash-head", "head", "-m", *words)
    assert code == 0, errors
    assert "FlashHead" not in errors


def test_the_server_of_mlx_lm(place):
    words, environment = command(
        "--flash-head", "head", "-m", "mlx_lm.server", "--model", "model", "--port", "0",
        "--log-level", "DEBUG",
    )  # fmt: skip
    # port 0 is not told, so a free one is chosen
    words[words.index("0")] = str(port := free_port())
    with subprocess.Popen(
        words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as server:  # fmt: skip
        said = ""
        while f"at 127.0.0.1 on port {port}" not in said:
            line = server.stdout.readline()
            assert line, said
            said += line
        body = {"messages": [{"role": "user", "content": "One"}], "max_tokens": 3}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 3
        server.send_signal(signal.SIGINT)
        said += server.communicate(timeout=60)[0]
    assert DENSE not in said


def test_a_program_from_pypi(place, monkeypatch):
    """llm with its plugin llm-mlx, by the name it is installed under."""
    pytest.importorskip("llm_mlx")
    user = place / "llm"
    user.mkdir()
    models = {str(place / "model"): {"aliases": ["tiny"]}}
    (user / "llm-mlx.json").write_text(json.dumps(models))
    monkeypatch.setenv("LLM_USER_PATH", str(user))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    words = ("llm", "-m", "tiny", "One day", "-o", "max_tokens", 5)
    code, output, errors = run(place, "--flash-head", "head", *words)
    assert code == 0, errors
    assert output.strip() and DENSE not in errors


@pytest.mark.parametrize("module", ["no_such.module", "mlx_lm.no_such", "model"])
def test_a_module_that_cannot_be_run(place, module):
    code, _, errors = run(place, "-m", module)
    assert code == 2
    assert errors == f"error: there is no module {module} that can be run: check -m.\n"


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "-m MODULE or a program is needed"),
        (("no_such_program",), "there is no file and no program no_such_program"),
        (("ls",), "is not a Python program"),
        (("--n-probes", 0, "program.py"), "--n-probes is 0: give a whole number of 1 or more"),
        (("--flash-head", "model", "program.py"), "model holds no FlashHead: name another"),
        (("--flash-head", "./absent", "program.py"), "There is no folder ./absent"),
    ],
)
def test_mistakes(refused, place, monkeypatch, words, said):
    monkeypatch.chdir(place)
    errors = refused("run", *words)
    assert errors.startswith("error: ") and "\n" not in errors and said in errors
