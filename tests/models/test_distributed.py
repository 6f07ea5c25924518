"""Two processes on this machine share a model: the text is that of one process."""

import json
import os
import re
import socket
import subprocess
import sys
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashhead import convert, generate, load
from mlx_flashhead.models.locate import find_head
from model_folders import write_model

ARGUMENTS = ("--prompt", "One day", "--max-tokens", "12", "--verbose", "False")
# A script of each process, since a start takes long: it runs all commands, loads the parts of a
# model, and writes what it has got into a file of its own.
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
    layers = [layer for layer in model.model.layers if layer is not None]
    heads = {layer.self_attn.n_heads for layer in layers}
    return text, get_flash_head(model).n_probes, config["model_type"], len(layers), *heads

found = [load({"pipeline_group": group}), load({})]
found += [run(arguments) for arguments in json.loads(commands)]
with open(f"{out}.{group.rank()}", "w") as file:
    json.dump(found, file)
mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))  # none ends before the other
"""


def free_ports() -> list[int]:
    """Two ports on which nobody listens."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return [one.getsockname()[1], other.getsockname()[1]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each of two processes has got: → (by command, its parts of a model, that model)."""
    place = tmp_path_factory.mktemp("launched")

    def write(name, **options):
        options = {"hidden_size": 128, "chat_template": None, "seed": 4} | options
        dense = write_model(place / f"{name}-dense", **options)
        flash = str(place / name)
        convert(str(dense), flash, n_probes=3, calibration="none", progress=False)
        return flash

    # It can be split both ways.
    qwen2 = write("qwen2", arch="qwen2", tied=False)
    commands = {
        "within layers": (qwen2,),
        "by layers": (qwen2, "--pipeline"),
        "llama by layers": (write("llama"), "--pipeline"),
        "prompt": (qwen2, "--prompt", "-"),
    }
    arguments = [["--model", name, *ARGUMENTS, *more] for name, *more in commands.values()]
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments), qwen2, str(place / "found")]
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports()]
    (place / "hosts").write_text(json.dumps(hosts))
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # These are the variables that mlx.launch gives.
    environment = os.environ | {"MLX_HOSTFILE": str(place / "hosts")}
    environments = [environment | {"MLX_RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, env=each, **options) for each in environments]
    try:
        said = "".join(process.communicate(timeout=300)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
    files = [place / f"found.{rank}" for rank in range(2)]
    assert all(file.exists() for file in files), said
    found = [json.loads(file.read_text()) for file in files]
    assert "Traceback" not in said + str(found)
    by_command = {}
    for number, name in enumerate(commands, start=2):
        by_command[name] = [of_process[number] for of_process in found]
    return by_command, [of_process[:2] for of_process in found], qwen2


def test_both_ways_to_split_give_the_text_of_one(launched):
    by_command, parts, qwen2 = launched
    expected = generate(*load(qwen2), "One day", max_tokens=12, dense=True) + "\n"
    for how in ("within layers", "by layers"):
        assert [output for output, _ in by_command[how]] == [expected, ""]
    expected = generate(*load(qwen2, n_probes=2), "One day", max_tokens=12)
    by_layers = [expected, 2, "qwen2", 1, 2]
    within_layers = [expected, 2, "qwen2", 2, 1]
    assert parts == [[by_layers, within_layers]] * 2


@pytest.mark.parametrize(
    "mistake, said",
    [
        ("prompt", "has no end: give the prompt"),
        ("llama by layers", "does not support pipelining"),
    ],
)
def test_mistakes_are_reported(launched, mistake, said):
    (output, errors), others = launched[0][mistake]
    assert output == ""
    assert errors.count("error:") == 1
    assert re.search(said, errors)
    assert others[0] == ""
    assert mistake != "prompt" or others[1] == ""


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
    with pytest.raises(ValueError, match="its 128 logits come from no layer of its own"):
        find_head(SplitHead(quantized))
