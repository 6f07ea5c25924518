"""Two processes on this machine share a model: the text is that of one process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashhead import convert, generate, load
from mlx_flashhead.models.locate import find_head
from mlx_flashhead.models.sharded import _check_attention_heads
from model_folders import write_model

LAUNCH = Path(sys.executable).with_name("mlx.launch")
CHECKOUT = Path(__file__).parents[2]
SECONDS = 120
ARGUMENTS = ("--prompt", "One day", "--max-tokens", "24", "--verbose", "False")
# A script under mlx.launch: each process writes what it has into a file of its own.
SCRIPT = """
import json, sys
import mlx.core as mx
from mlx_flashhead import get_flash_head, generate, sharded_load
group = mx.distributed.init(strict=True)
folder, kind, out = sys.argv[1:]
groups = {kind + "_group": group} if kind != "either" else {}
model, tokenizer, config = sharded_load(folder, **groups, return_config=True, n_probes=2)
text = generate(model, tokenizer, "One day", max_tokens=12)
mx.synchronize()
mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))
head = get_flash_head(model)
found = {
    "text": text, "n_probes": head.n_probes, "model_type": config["model_type"],
    "layers": sum(layer is not None for layer in model.model.layers),
    "heads": [layer.self_attn.n_heads for layer in model.model.layers if layer is not None],
}
with open(f"{out}.{group.rank()}", "w") as file:
    json.dump(found, file)
"""


def write(folder, **options):
    """``(dense, converted)`` folders of a tiny model."""
    options = {"hidden_size": 128, "chat_template": None, "seed": 4} | options
    dense = write_model(folder / "dense", **options)
    convert(str(dense), str(folder / "flash"), n_probes=3, calibration="none", progress=False)
    return dense, folder / "flash"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Can be split within its layers."""
    return write(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """Can be split both ways."""
    return write(tmp_path_factory.mktemp("qwen2"), arch="qwen2", tied=False)


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
    process = subprocess.Popen(
        [str(part) for part in (sys.executable, LAUNCH, *arguments, sys.executable, *command)],
        stdin=subprocess.PIPE,  # mlx.launch reads from it for as long as it runs
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its children are of its group, and end with it
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"},
        cwd=CHECKOUT,
    )
    timer = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    errors = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read().decode()))
    reader.start()
    try:
        output = process.stdout.read().decode()
        reader.join()
        code = process.wait()
    finally:
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if code == -signal.SIGKILL:
        pytest.fail(f"two processes did not end within {SECONDS} seconds: {errors}", pytrace=False)
    return output, errors[0]


@pytest.mark.parametrize("name, how", [("llama", ()), ("qwen2", ()), ("qwen2", ("--pipeline",))])
def test_two_processes_print_the_text_of_one(request, name, how):
    flash = request.getfixturevalue(name)[1]
    arguments = ("--model", flash, *ARGUMENTS)
    alone = load(str(flash))
    expected = generate(*alone, "One day", max_tokens=24, dense=True) + "\n"
    output, errors = launch("-m", "mlx_flashhead.generate", *arguments, *how)
    assert output == expected, errors
    assert "Traceback" not in errors and "exited with" not in errors


@pytest.mark.parametrize("kind", ["pipeline", "either"])
def test_each_process_has_its_part_and_a_flash_head(qwen2, tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    _, errors = launch(script, qwen2[1], kind, tmp_path / "found")
    files = [tmp_path / f"found.{rank}" for rank in range(2)]
    assert all(file.exists() for file in files), errors
    found = [json.loads(file.read_text()) for file in files]
    model, tokenizer = load(str(qwen2[1]), n_probes=2)
    expected = generate(model, tokenizer, "One day", max_tokens=12)
    for part in found:
        assert part["text"] == expected
        assert part["n_probes"] == 2 and part["model_type"] == "qwen2"
        assert (part["layers"], set(part["heads"])) == (
            (1, {2}) if kind == "pipeline" else (2, {1})
        )


def test_mistakes_are_told_by_the_first_process(qwen2):
    refused = launch("-m", "mlx_flashhead.generate", "--model", qwen2[1], "--prompt", "-")
    assert refused[0] == ""
    assert refused[1].count("error:") == 1 and "has no end: give the prompt" in refused[1]


def test_a_model_whose_heads_do_not_divide_is_told_of_its_other_way(tmp_path):
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    _, flash = write(tmp_path, arch="qwen2", hidden_size=96, further=heads)
    command = ("-m", "mlx_flashhead.generate", "--model", flash, *ARGUMENTS)
    output, errors = launch(*command)
    assert output == "" and "3 attention heads" in errors and "use --pipeline" in errors
    assert "Traceback" not in errors


def test_a_model_that_cannot_be_pipelined(llama):
    command = ("-m", "mlx_flashhead.generate", "--model", llama[1], *ARGUMENTS, "--pipeline")
    _, errors = launch(*command)
    assert "does not support pipelining" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "config, said",
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, "9 attention heads .3 of"),
        ({"num_attention_heads": 9}, "9 attention heads .9 of"),
        ({"text_config": {"num_attention_heads": 12, "num_key_value_heads": 3}}, "to 2 processes"),
    ],
)
def test_attention_heads_that_cannot_be_shared_out(config, said):
    for by_layers, instead in ((True, "use `pipeline_group`"), (False, "use one, or")):
        with pytest.raises(ValueError, match=f"{said}.*{instead}"):
            _check_attention_heads(config, 2, by_layers=by_layers)


@pytest.mark.parametrize(
    "config",
    [{"num_attention_heads": 8, "num_key_value_heads": 1}, {"num_attention_heads": 4}, {}],
)
def test_attention_heads_that_can(config):
    _check_attention_heads(config, 2, by_layers=True)


class Group:
    """Stands in for a group of two processes."""

    def size(self):
        return 2


class SplitHead(nn.Module):
    """A model whose head is split over the vocabulary, as qwen3_5's under tensor parallelism."""

    def __init__(self, quantized):
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.lm_head = nn.AllToShardedLinear(32, 64, bias=False)
        if quantized:
            self.lm_head = nn.QuantizedAllToShardedLinear(32, 64, False, 32)
        self.lm_head.group = Group()

    def __call__(self, inputs):
        return mx.concatenate([self.lm_head(self.embed_tokens(inputs))] * 2, axis=-1)


@pytest.mark.parametrize("quantized", [False, True])
def test_heads_split_over_the_vocabulary_are_refused(quantized):
    said = "Each of the 2 processes holds a part .* of 128.*`pipeline_group`.*one process"
    with pytest.raises(ValueError, match=said):
        find_head(SplitHead(quantized))
