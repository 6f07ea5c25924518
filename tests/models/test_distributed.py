"""Two processes on this machine share a model: the text is that of one process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashhead import convert, generate, load
from mlx_flashhead.models.dense import _check_attention_heads
from mlx_flashhead.models.locate import find_head
from model_folders import write_model

LAUNCH = Path(sys.executable).with_name("mlx.launch")
CHECKOUT = Path(__file__).parents[2]
SECONDS = 120
ARGUMENTS = ("--prompt", "One day", "--max-tokens", "24", "--verbose", "False")
# A script under mlx.launch, since a start takes long: both processes run all commands and load the
# parts of a model, and each writes what it has got into a file of its own.
SCRIPT = """
import contextlib, importlib, io, json, sys
import mlx.core as mx
from mlx_flashhead import generate, get_flash_head, sharded_load

group = mx.distributed.init(strict=True)
commands, folder, out = sys.argv[1:]
main = importlib.import_module("mlx_flashhead.generate").main

def run(arguments):
    sys.argv[1:] = arguments
    printed = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with contextlib.redirect_stdout(printed[0]), contextlib.redirect_stderr(printed[1]):
        with contextlib.suppress(SystemExit):
            main()
    return [(file.flush(), file.buffer.getvalue().decode())[1] for file in printed]

def load(groups):
    model, tokenizer, config = sharded_load(folder, **groups, return_config=True, n_probes=2)
    text = generate(model, tokenizer, "One day", max_tokens=12)
    mx.synchronize()
    mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))
    layers = [layer for layer in model.model.layers if layer is not None]
    heads = {layer.self_attn.n_heads for layer in layers}
    head = get_flash_head(model)
    return text, head.n_probes, config["model_type"], len(layers), *heads

found = [run(arguments) for arguments in json.loads(commands)]
found += [load({"pipeline_group": group}), load({})]
with open(f"{out}.{group.rank()}", "w") as file:
    json.dump(found, file)
"""


def write(folder, **options):
    """The folder of a tiny converted model."""
    options = {"hidden_size": 128, "chat_template": None, "seed": 4} | options
    dense = write_model(folder / "dense", **options)
    convert(str(dense), str(folder / "flash"), n_probes=3, calibration="none", progress=False)
    return str(folder / "flash")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llama"))  # can be split within its layers


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return write(tmp_path_factory.mktemp("qwen2"), arch="qwen2", tied=False)  # both ways


def free_ports():
    """Two ports in a row that nobody listens on; taken only when the processes start."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    pytest.fail("there are no two free ports in a row")


def launch(*command):
    """Runs a Python command as two processes: → (standard output, standard error)."""
    arguments = ["-n", 2, "--backend", "ring", "--starting-port", free_ports(), "--"]
    with TemporaryFile() as output, TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(part) for part in (sys.executable, LAUNCH, *arguments, sys.executable, *command)],
            stdin=subprocess.PIPE,  # mlx.launch reads from it for as long as it runs
            stdout=output,
            stderr=errors,
            start_new_session=True,  # its children are of its group, and end with it
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"},
            cwd=CHECKOUT,
        )
        try:
            process.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return [(file.seek(0), file.read().decode())[1] for file in (output, errors)]


@pytest.fixture(scope="module")
def launched(llama, qwen2, tmp_path_factory):
    """What each of two processes has got: → (by command, its parts of a model)."""
    folder = tmp_path_factory.mktemp("launched")
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    odd = write(folder / "odd", arch="qwen2", hidden_size=96, further=heads)
    commands = {
        "within layers": (qwen2,),
        "by layers": (qwen2, "--pipeline"),
        "odd": (odd,),
        "llama by layers": (llama, "--pipeline"),
        "prompt": (qwen2, "--prompt", "-"),
    }
    arguments = [["--model", name, *ARGUMENTS, *more] for name, *more in commands.values()]
    script = folder / "script.py"
    script.write_text(SCRIPT)
    _, errors = launch(script, json.dumps(arguments), qwen2, folder / "found")
    files = [folder / f"found.{rank}" for rank in range(2)]
    assert all(file.exists() for file in files), errors
    found = [json.loads(file.read_text()) for file in files]
    assert "Traceback" not in errors + str(found)
    by_command = {name: [part[i] for part in found] for i, name in enumerate(commands)}
    return by_command, [part[len(commands) :] for part in found]


@pytest.mark.parametrize("how", ["within layers", "by layers"])
def test_both_ways_to_split_give_the_text_of_one(launched, qwen2, how):
    expected = generate(*load(qwen2), "One day", max_tokens=24, dense=True) + "\n"
    assert [output for output, _ in launched[0][how]] == [expected, ""]


def test_each_process_has_its_part_and_a_flash_head(launched, qwen2):
    expected = generate(*load(qwen2, n_probes=2), "One day", max_tokens=12)
    by_layers, within_layers = [expected, 2, "qwen2", 1, 2], [expected, 2, "qwen2", 2, 1]
    assert launched[1] == [[by_layers, within_layers]] * 2


@pytest.mark.parametrize(
    "mistake, said",
    [
        ("prompt", "has no end: give the prompt"),
        ("odd", "3 attention heads.*use --pipeline"),
        ("llama by layers", "does not support pipelining"),
    ],
)
def test_mistakes_are_told(launched, mistake, said):
    (output, errors), others = launched[0][mistake]
    assert output == "" and errors.count("error:") == 1
    assert re.search(said, errors)
    assert others[0] == "" and (mistake != "prompt" or others[1] == "")


@pytest.mark.parametrize(
    "heads, said",
    [
        ((9, 3), "9 attention heads .3 of"),
        ((9,), "9 attention heads .9 of"),
        ((12, 3), "to 2 processes"),
        ((8, 1), None),
        ((4,), None),
        ((), None),
    ],
)
def test_attention_heads_that_cannot_be_shared_out(heads, said):
    config = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=False))
    for by_layers, instead in ((True, "use `pipeline_group`"), (False, "use one, or")):
        refused = pytest.raises(ValueError, match=f"{said}.*{instead}")
        with refused if said else contextlib.nullcontext():
            _check_attention_heads({"text_config": config}, 2, by_layers=by_layers)


class SplitHead(nn.Module):
    """A model whose head is split over the vocabulary, as qwen3_5's under tensor parallelism."""

    def __init__(self, quantized):
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.lm_head = nn.AllToShardedLinear(32, 64, bias=False)
        if quantized:
            self.lm_head = nn.QuantizedAllToShardedLinear(32, 64, False, 32)
        self.lm_head.group = Mock(size=lambda: 2)

    def __call__(self, inputs):
        return mx.concatenate([self.lm_head(self.embed_tokens(inputs))] * 2, axis=-1)


@pytest.mark.parametrize("quantized", [False, True])
def test_heads_split_over_the_vocabulary_are_refused(quantized):
    said = "Each of the 2 processes holds a part .* of 128.*`pipeline_group`.*one process"
    with pytest.raises(ValueError, match=said):
        find_head(SplitHead(quantized))
