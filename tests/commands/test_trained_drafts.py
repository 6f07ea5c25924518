"""A trained drafter at every door, as a user types it: the text is the one without it."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm")

from model_folders import VOCAB_SIZE, write_tokenizer
from trained_drafters import exact_pair

ASK = ("--prompt", "hello", "--max-tokens", 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and its drafter, which mostly knows the next token, beside it."""
    place = tmp_path_factory.mktemp("drafts")
    model, drafter = exact_pair("qwen3_5", noise=0.3, vocab_size=VOCAB_SIZE)
    arrays = dict(tree_flatten(model.parameters()))
    layer = dict(tree_flatten(drafter.module.parameters()))
    config = {"text_config": model.args.text_config, "model_type": "qwen3_5", "eos_token_id": 1}
    # The norms in the form of the originals.
    own = {f"mtp.{name}": array for name, array in layer.items()}
    for name, weights, about in (
        ("model", arrays, config),
        ("with_mtp", arrays | own, config),
        ("drafter", layer, drafter_config(config)),
    ):
        folder = place / name
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(about))
        write_tokenizer(folder)
    return place


def drafter_config(config):
    text = config["text_config"] | {"mtp_num_hidden_layers": 1, "model_type": "qwen3_5_text"}
    return {"model_type": "qwen3_5_mtp", "text_config": text, "block_size": 4}


DOORS = {"a drafter": ("model", "--draft-model", "drafter"), "its own": ("with_mtp", "--mtp")}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "options",
    [(), ("--no-build",), ("--dense",), ("--temp", 0.8, "--seed", 4), ("--regex", "[a-z ]{9,40}")],
)
def test_generate(run, place, monkeypatch, door, options):
    monkeypatch.chdir(place)
    model, *flags = DOORS[door]
    given = ["generate", "--model", model, *ASK, *options]
    if "--no-build" not in options:
        given += ["--build-first", "--flash-head-always"]
    # This builds the FlashHead.
    run(*given)
    plain = run(*given)[1].split("=====")[2]
    code, output, _ = run(*given, *flags, "--lookup", "on")
    assert code == 0
    assert output.split("=====")[2] == plain
    guessed, drafts = output.splitlines()[-2:]
    assert guessed.startswith("Guessed: ") and "MTP, 3 deep" in guessed
    assert drafts.startswith("Drafts: MTP with ")
    assert ("FlashHead" in drafts) == (not {"--no-build", "--dense"}.intersection(options))


@pytest.mark.parametrize("by_program", [True, False])
def test_run(place, by_program):
    """By the program's flag, and by that of this command."""
    program = ["-m", "mlx_lm", "generate", "--model", "model", *map(str, ASK)]
    plain = _output(place, *program).split("=====")[2]
    ours = ["-m", "mlx_flashhead.run", "--lookup", "on", "--build-first"]
    program = ["mlx_lm.generate", "--model", "model", *map(str, ASK)]
    if by_program:
        program += ["--draft-model", "drafter"]
    else:
        ours += ["--draft-model", "drafter"]
    assert _output(place, *ours, *program).split("=====")[2] == plain


def _output(place, *words):
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mistakes(refused, place, monkeypatch):
    monkeypatch.chdir(place)
    given = ("generate", "--model", "model", *ASK)
    assert "give one of them" in refused(*given, "--mtp", "--draft-model", "drafter")
    for flags in (("--no-verify",), ("--temp", 1, "--draw-probes")):
        said = refused(*given, *flags, "--mtp")
        assert f"{flags[-1]} verifies no guesses: leave --draft-model and --mtp out" in said
    said = refused(*given, "--draft-model", "drafter", "--draft-probes", 2)
    assert "leave --draft-probes out" in said
    assert "name one with --mtp" in refused(*given, "--mtp")
    assert "cannot draft for a model of mlx-lm" in refused(*given, "--draft-model", other(place))
    assert refused(*given, "--mtp", "model").endswith("has no MTP layer: leave --mtp out.")


def other(place):
    folder = place / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "eagle3"}))
    return folder
