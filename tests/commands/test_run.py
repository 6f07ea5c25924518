"""``run``: other programs with a FlashHead under their ``mlx_lm.load``."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import mlx_lm
import pexpect
import pytest

import mlx_flashhead.run as run_command
from mlx_flashhead.index.files import write_companion
from model_folders import write_model
from run_programs import DENSE, MANY, alone, process, running_server, start, start_many
from tiny_models import tiny_index

# A program that knows nothing of FlashHead, and that loads in three ways.
PROGRAM = """
import sys
from pathlib import Path
import mlx_lm
from mlx_lm.utils import load, load_model

for folder in sys.argv[1:]:
    for function in (load, mlx_lm.load, load_model):
        model, _ = function(Path(folder))
        print(type(model.model.embed_tokens).__mro__[1].__name__, __name__)
"""
BATCH = """
import mlx.core as mx
import mlx_lm
from mlx_lm.generate import batch_generate
from mlx_lm.sample_utils import make_sampler

model, tokenizer = mlx_lm.load("model")
prompts = [tokenizer.encode(f"{i} One day") for i in range(8)]
for options in {}, {"sampler": make_sampler(0.8)}, {"sampler": make_sampler(0.7, top_p=0.9)}:
    mx.random.seed(3)
    print(batch_generate(model, tokenizer, prompts, max_tokens=20, **options).texts)
"""
OWN_LOOP = """
import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

model, tokenizer = mlx_lm.load("model")
cache, tokens = make_prompt_cache(model), mx.array([tokenizer.encode("One day")])
for _ in range(12):
    tokens = mx.argmax(model(tokens, cache=cache)[:, -1], axis=-1)[None]
    print(tokens.item())
"""
STARTER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "program.py", *sys.argv[1:]]).returncode)
"""
PROGRAMS = {"program": PROGRAM, "starter": STARTER, "batch": BATCH, "own_loop": OWN_LOOP}
PROGRAMS |= {"many": MANY}
HEAD = ("--flash-head", "head")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its FlashHead apart, texts, and programs."""
    place = tmp_path_factory.mktemp("run")
    model = write_model(place / "model")
    for folder in ("head", "data"):
        (place / folder).mkdir()
    write_companion(place / "head", tiny_index(mlx_lm.load(str(model))[0]))
    for name in ("train", "valid"):
        lines = 2 * (json.dumps({"text": "One day " * 9}) + "\n")
        (place / "data" / f"{name}.jsonl").write_text(lines)
    for name, program in PROGRAMS.items():
        (place / f"{name}.py").write_text(program)
    return place


def test_programs_get_the_flash_head(place, capsys):
    """One of its own, and those of mlx-lm that generate, each as the program of its process. Texts
    are the normal head's, with a draft model too. A program's arguments are its own, also those
    that this one has. A loop of its own keeps the normal head."""
    text = "mlx_lm.generate --model model --prompt=--n-probes --max-tokens 24"
    programs = ["program.py model", "own_loop.py", f"-m {text}", f"-m {text} --draft-model model"]
    programs += ["-m mlx_lm.benchmark --model model -p 8 -g 4 -n 1"]
    programs += ["-m mlx_lm.chat --model model --max-tokens 4"]
    # Scripts/oldest.txt does not install it.
    if find_spec("datasets"):
        programs.append(
            "-m mlx_lm.perplexity --model model --data-path data --sequence-length 16 "
            "--num-samples 2 --batch-size 1"
        )
    shown = start_many(place, *HEAD, "many.py", *programs, typed="One\nq\n")
    output, errors = zip(*shown, strict=True)
    assert output[0].splitlines() == 3 * ["FlashEmbedding __main__"]
    assert output[1] == alone(capsys, place, "own_loop.py")
    assert "Text of model: dense: this program's loop cannot be verified" in errors[1]
    dense = alone(capsys, place, *text.split()).split("=====")[2]
    assert [printed.split("=====")[2] for printed in output[2:4]] == [dense] * 2
    assert "Text of model: verified." in errors[2]
    assert "Averages: prompt_tps=" in output[4] and "chat" in output[5]
    assert len(programs) == 6 or "Perplexity: " in output[6]
    assert DENSE not in "".join(errors)
    loads = [said.count("With FlashHead: model") for said in errors]
    # A draft has one, too.
    assert loads == [3, 1, 1, 2, *[1] * (len(programs) - 4)]


def test_a_model_that_is_not_there(place):
    """The program's own traceback stays, without the Hub's, and one line says what to do."""
    words = ("-m", "mlx_lm.generate", "--model", "owner/absent", "--prompt", "x")
    code, _, errors = start(place, *words)
    *_, traceback, last = errors.splitlines()
    assert code == 1 and "Error" in traceback
    assert errors.count("Traceback (most recent call last)") == 1
    assert last.startswith("mlx_flashhead.run: There is no folder 'owner/absent' here, and it was")


def test_a_model_in_another_format(place, tmp_path):
    """The program's own traceback stays, and one line names what the folder holds."""
    (tmp_path / "model.Q4.gguf").touch()
    words = ("-m", "mlx_lm.generate", "--model", str(tmp_path), "--prompt", "x")
    code, _, errors = start(place, *words)
    *_, last = errors.splitlines()
    assert code == 1 and "Traceback (most recent call last)" in errors
    assert last.startswith(f"mlx_flashhead.run: {tmp_path} holds a GGUF file (model.Q4.gguf), ")


def test_programs_that_are_started_as_commands(run, place, tmp_path, monkeypatch):
    """By a program, beside a sitecustomize that is there already; or by the variables alone."""
    (tmp_path / "sitecustomize.py").write_text("import sys; print('mine', file=sys.stderr)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    code, output, errors = start(place, *HEAD, "starter.py", "model")
    assert (code, output.splitlines()) == (0, 3 * ["FlashEmbedding __main__"]), errors
    assert errors.count("mine") == 3 and DENSE not in errors

    code, lines, errors = run("run", "--hook", "--flash-head", place / "head")
    assert (code, errors) == (0, "")
    words = ["sh", "-c", f'{lines}\nexec "$0" "$@"', sys.executable, "program.py", "model"]
    program = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert program.stdout == output and "mine" in program.stderr


def test_what_does_not_generate_gets_the_dense_model_silently(place):
    programs = [
        "-m mlx_lm.convert --hf-path model -q --q-group-size 32 --mlx-path out",
        "-m mlx_lm convert --hf-path model --mlx-path copy",
        "-m mlx_lm.lora --model model --train --fine-tune-type lora --iters 1 --batch-size 1 "
        "--num-layers 1 --data data",
    ]
    shown = start_many(place, *HEAD, "many.py", *programs)
    assert len(shown) == 3 and not any("FlashHead" in errors for _, errors in shown)


def test_dense_with_one_warning_where_there_is_none(place):
    """A model that is not there is the program's own affair."""
    code, output, errors = start(place, "--no-build", "program.py", "model", "./absent")
    assert code == 1 and "Traceback" in errors
    assert output.splitlines() == 3 * ["Module __main__"]
    assert errors.count(DENSE) == 1 and "There is no FlashHead of model yet" in errors


def test_batches_of_mlx_lm_are_those_without_flash_head(place, capsys):
    """Greedy, and with a seed. Those of a server come below."""
    code, output, errors = start(place, *HEAD, "batch.py")
    assert (code, output) == (0, alone(capsys, place, "batch.py")), errors
    assert errors.count("Text of model: verified.") == 1
    _, unverified, errors = start(place, *HEAD, "--no-verify", "batch.py")
    assert unverified != output and "Text of model: unverified." in errors


def test_the_server_of_mlx_lm_with_eight_clients(place):
    """The texts are those of the same server without us, at once and with a seed."""
    answers = []
    errors = ""
    for under in (), ("mlx_flashhead.run", *HEAD):
        words = ("mlx_lm.server", "--model", "model")
        with running_server(place, *words, ready="at 127.0.0.1 on port", under=under) as server:

            def ask(i, server=server, **options):
                return server.ask(f"{i} One day", max_tokens=12, **options)

            with ThreadPoolExecutor(8) as pool:
                texts = list(pool.map(ask, range(8)))
            sampled = [ask(0, temperature=0.7, top_p=top_p, seed=5) for top_p in (1.0, 0.9)]
            answers.append((texts, sampled))
        errors = server.said
    assert answers[0] == answers[1] and len({*answers[0][0]}) > 1
    assert DENSE not in errors and "Text of model: verified." in errors


def test_a_program_from_pypi(place, monkeypatch):
    """llm with its plugin llm-mlx, by the name it is installed under."""
    pytest.importorskip("llm_mlx")
    user = place / "llm"
    user.mkdir()
    (user / "llm-mlx.json").write_text(json.dumps({str(place / "model"): {"aliases": ["tiny"]}}))
    monkeypatch.setenv("LLM_USER_PATH", str(user))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    words = ("llm", "-m", "tiny", "One day", "-o", "max_tokens", 5)
    code, output, errors = start(place, *HEAD, *words)
    assert code == 0 and output.strip() and DENSE not in errors, errors


NOT_RUN = "that can be run: check the name."


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "a program is needed, such as mlx_lm.server"),
        (("no_such_program",), "there is no file and no program no_such_program: check the name."),
        (("omlx", "serve"), "there is no file and no program omlx: pip install flyto-mlx."),
        (("-m", "no_such.module"), f"there is no module no_such.module {NOT_RUN}"),
        (("-m", "mlx_lm.no_such"), f"there is no module mlx_lm.no_such {NOT_RUN}"),
        (("-m", "model"), f"there is no module model {NOT_RUN}"),
        (("--n-probes", 0, "program.py"), "--n-probes is 0: give a whole number of 1 or more"),
        (("--flash-head", "model", "program.py"), "model holds no FlashHead: name another"),
        (("--flash-head", "./absent", "program.py"), "There is no folder ./absent"),
    ],
)
def test_mistakes(refused, place, monkeypatch, words, said):
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(place)
    assert said in refused("run", *words)


def test_programs_of_mlx_vlm_that_are_not_installed(refused, monkeypatch):
    monkeypatch.setattr(run_command, "find_spec", lambda name: None)
    said = refused("run", "mlx_vlm.chat", "--model", "x")
    assert "mlx_vlm.chat that can be run: pip install 'mlx_flashhead[vlm]'." in said


def test_a_program_of_mlx_lm_that_has_only_a_main(run, place, monkeypatch, capsys):
    """As a module ``mlx_lm.evaluate`` runs nothing; `mlx_lm.share` is another such program."""
    become = Mock()
    monkeypatch.setattr(os, "execve", become)
    monkeypatch.chdir(place)
    assert run("run", *HEAD, "mlx_lm.share", "--help")[0] == 0
    ((python, command, _),) = (call.args for call in become.call_args_list)
    assert command[:2] == [python, "-c"] == [sys.executable, "-c"]
    monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
    with pytest.raises(SystemExit, match="0"):
        exec(command[2], {})
    assert capsys.readouterr().out.startswith("usage: ")


CHECKS = """
import mlx.core as mx
import mlx_lm

model, tokenizer = mlx_lm.load("model")
print(mlx_lm.generate(model, tokenizer, "One day", max_tokens=20))
unknown = lambda logprobs: mx.argmax(logprobs, axis=-1)
print(mlx_lm.generate(model, tokenizer, "One day", max_tokens=20, sampler=unknown))
"""


def test_the_tokens_are_counted_at_the_end(place):
    (place / "checks.py").write_text(CHECKS)
    code, output, errors = start(place, *HEAD, "--check", "checks.py")
    if output.count("\n") == 2:
        first, second = output.splitlines()
    else:
        first = output
        second = output
    assert code == 0 and first == second
    reason = "dense: its sampler, or one of its processors, cannot be verified"
    assert f"Text of model: {reason}." in errors
    last = errors.splitlines()[-1]
    assert last.startswith(
        "Checked model: 40 tokens: 19 verified (48%); 1 the first of their texts"
    )
    assert last.endswith(f"20 {reason}.")


WAITS = """
import sys, time
import mlx_lm

model, tokenizer = mlx_lm.load("model")
print(mlx_lm.generate(model, tokenizer, "One day", max_tokens=20), "ready", flush=True)
time.sleep(600)
"""


def test_the_tokens_are_counted_when_sigterm_ends_a_service(place):
    (place / "waits.py").write_text(WAITS)
    words = ("mlx_flashhead.run", *HEAD, "--check", "waits.py")
    with process(place, *words, stderr=subprocess.PIPE) as program:
        while "ready" not in program.stdout.readline():
            pass
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=120)
    assert program.returncode == -signal.SIGTERM
    assert errors.splitlines()[-1].startswith("Checked model: 20 tokens: 19 verified (95%); 1 the")


# A program of a user at a terminal, within which a build takes a second.
FIRST_USE = """
import sys
from functools import partial

import mlx_lm

from mlx_flashhead.loading import build_parts

if sys.argv[1:]:
    build_parts.IndexOptions = partial(build_parts.IndexOptions, calibration_positions=100)
model, tokenizer = mlx_lm.load("model")
print("answer:", end=" ", flush=True)
for response in mlx_lm.stream_generate(model, tokenizer, "One day", max_tokens=20):
    print(response.token, end=" ", flush=True)
print("end")
"""


def at_a_terminal(place, *words):
    (place / "first_use.py").write_text(FIRST_USE)
    command = ["-m", "mlx_flashhead.run", "first_use.py", *words]
    return pexpect.spawn(sys.executable, command, cwd=place, timeout=120, encoding="utf-8")


def test_a_first_use_answers_and_is_prepared_for_the_next_one(place):
    """The lines stand before the answer, and after it, and never in it."""
    shown = []
    for _ in range(2):
        child = at_a_terminal(place, "quick")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        # Without the bar, which is drawn again and again in one line.
        lines = child.before.replace("\r\n", "\n").split("\n")
        shown.append([line for line in lines if line and "%|" not in line])
    first, second = shown
    assert first[0].startswith("Building the FlashHead of model while the model is idle, which")
    # The program has begun a line before its first token.
    prefix = "answer: Text of model: "
    assert first[1] == prefix + "dense: its FlashHead is being built."
    assert first[2].endswith(" end") and len(first[2].split()) == 21
    assert first[3:] == [
        "Preparing FlashHead for next time. Ctrl-C leaves, and it goes on next time.",
        "FlashHead is ready for next time.",
    ]
    assert second[0].startswith("With FlashHead: model, ")
    assert second[1:] == [prefix + "verified.", first[2]]


def test_a_first_use_in_a_script_ends_and_says_how_to_build(place, flash_head_home):
    (place / "first_use.py").write_text(FIRST_USE)
    code, output, errors = start(place, "first_use.py")
    assert code == 0 and output.endswith(" end\n")
    building, text, end = errors.splitlines()
    assert building.startswith("Building the FlashHead of model while the model is idle")
    assert text == "Text of model: dense: its FlashHead is being built."
    assert "--build-first builds it before the first text, and `mlx_flashhead.cache --build" in end
    assert not list(flash_head_home.glob("**/*.safetensors"))


def test_ctrl_c_skips_what_is_prepared(place, flash_head_home):
    child = at_a_terminal(place)
    child.expect_exact("Ctrl-C leaves, and it goes on next time.")
    child.expect(r"FlashHead: +\d+%")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Its build goes on next time." in child.before
    assert "Traceback" not in child.before and "is ready" not in child.before
    assert not list(flash_head_home.glob("**/*.safetensors"))


def test_ctrl_c_while_it_is_built_first_is_a_sentence(place):
    """It ends the program, as its build was asked for."""
    (place / "first_use.py").write_text(FIRST_USE)
    words = ("mlx_flashhead.run", "--build-first", "first_use.py")
    with process(place, *words, stderr=subprocess.PIPE) as program:
        while "Building the FlashHead" not in program.stderr.readline():
            pass
        program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=120)
    assert (program.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "Interrupted: the next use of the model tries again."
    assert "Traceback" not in errors
