"""How the commands start and end, without the extras too, and the README's sample."""

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest.mock import Mock

import pytest

from mlx_flashhead.__main__ import COMMANDS

CHECKOUT = Path(__file__).parents[2]

REMEDIES = (
    (errno.ENOSPC, "free some space or choose another place"),
    (errno.EDQUOT, "free some space or choose another place"),
    (errno.EACCES, "choose another place, or get the permission"),
    (errno.EROFS, "choose another place, or get the permission"),
    (errno.EIO, "check the path and the disk"),
)
# As `python -m` does, but in one process.
HELP = """
import runpy, sys
for name in NAMES:
    sys.argv = ['-m', '--help']
    try:
        runpy.run_module(f'mlx_flashhead.{name}', run_name='__main__', alter_sys=True)
    except SystemExit as end:
        assert end.code == 0, name
"""


def start(*command, **options):
    """(exit code, standard output, standard error) of a process."""
    environment = dict(os.environ)
    # what a user's shell does not have set
    for name in ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_VERBOSITY"):
        environment.pop(name, None)
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, **options
    )
    return result.returncode, result.stdout, result.stderr


def test_help_of_all_commands_imports_no_library_of_models():
    """And no module warns. Such a library takes a second or more."""
    script = HELP.replace("NAMES", repr([*COMMANDS]))
    script += "print(sorted({'mlx_lm', 'mlx_vlm', 'transformers'} & {*sys.modules}))"
    code, output, errors = start(sys.executable, "-W", "error::RuntimeWarning", "-c", script)
    assert (code, errors) == (0, "") and output.splitlines()[-1] == "[]"
    used = [line.split()[1] for line in output.splitlines() if line.startswith("usage: ")]
    assert used == [f"mlx_flashhead.{command}" for command in COMMANDS]


def test_ctrl_c_during_the_imports_ends_without_a_traceback(dense):
    words = ["-X", "importtime", "-m", "mlx_flashhead.generate", "--model", str(dense)]
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as process:
        while not process.stderr.readline().rstrip().endswith(" transformers.utils"):
            pass
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130


def test_console_script_generates_and_prints_nothing_else(run, converted):
    """No library's notice: all that is on the screen is the answer."""
    script = Path(sysconfig.get_path("scripts")) / "mlx_flashhead.generate"
    assert script.exists(), "install the package first: pip install -e ."
    arguments = ("--model", converted, "--max-tokens", 5, "--verbose", "F")
    arguments += ("--flash-head-always", "--prompt")
    expected = run("generate", *arguments, "One day")
    assert start(script, *arguments, "-", input="One day") == expected
    assert expected[::2] == (0, "")


def test_script_converts(dense, tmp_path):
    """From another folder, as `python scripts/convert.py` of a clone."""
    code, output, _ = start(
        sys.executable, "-W", "error::RuntimeWarning", CHECKOUT / "scripts" / "convert.py",
        "--model", dense, "--mlx-path", "model", "--calibration", "none", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0 and "Writing model" in output
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "command", ["generate", "chat", "convert", "export", "evaluate", "benchmark"]
)
def test_how_commands_end(run, monkeypatch, command):
    module = importlib.import_module(f"mlx_flashhead.{command}")
    for error, code, said in (
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
        (BrokenPipeError(), 141, ""),
        (ValueError("One sentence.\nAnd a second line."), 2, "error: One sentence.\n"),
        (ValueError("No \x1b[31mname\x07\x9b."), 2, "error: No [31mname.\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (OSError("No disk."), 2, "error: No disk.\n"),
        *((OSError(n, os.strerror(n), "file"), 2, f"{os.strerror(n)}: {r}") for n, r in REMEDIES),
    ):
        monkeypatch.setattr(module, "make_parser", Mock(side_effect=error))
        found, output, errors = run(command)
        assert (found, output) == (code, "") and errors in (said, f"error: file: {said}.\n")


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--help"], 0, "usage: mlx_flashhead COMMAND …\n"),
        (["--version"], 0, ""),
        (["no-such-command"], 2, "error: there is no command no-such-command: choose one of gen"),
        (["generate", "--model", "./absent"], 2, "error: There is no folder ./absent: check the "),
    ],
)
def test_the_package_is_a_command(run, words, code, said):
    ended, output, errors = run("__main__", *words)
    shown = output + errors
    assert ended == code and shown.startswith(said) and not (output and errors)
    assert code == 0 or shown.count("\n") == 1
    if words == ["--help"]:
        assert all(f"  {command}" in shown for command in COMMANDS)


OF_EXTRAS = ("rich", "matplotlib", "prompt_toolkit", "segno", "llguidance")
# None in sys.modules makes an import fail as that of a module that is not installed.
RUN = f"""
import json, runpy, sys

sys.modules.update(dict.fromkeys({OF_EXTRAS!r}))
for command, *arguments in json.loads(sys.argv.pop()):
    if command in ("chat", "benchmark"):  # mlx-lm's own chat, whose flags these are, imports rich
        sys.modules.pop("rich", None)
    sys.argv[1:] = arguments
    print(f"== {{command}}", flush=True)
    try:
        runpy.run_module(f"mlx_flashhead.{{command}}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, command
"""


def test_a_model_is_converted_and_generates(dense, tmp_path):
    """All in one process, without what the extras bring."""
    answers = ["--model", tmp_path / "flash", "--max-tokens", 4]
    commands = [
        ["convert", "--hf-path", dense, "--mlx-path", tmp_path / "flash", "--calibration", "none"],
        ["generate", *answers, "--prompt", "One day"],
        ["server", "--help"],
        ["chat", *answers],
        ["benchmark", "head", "--shape", "512,64", "--n-probes", 4, "--rounds", 1],
    ]
    process = [sys.executable, "-c", RUN, json.dumps([[*map(str, words)] for words in commands])]
    result = subprocess.run(process, capture_output=True, text=True, input="One day\n")
    assert result.returncode == 0, result.stderr
    shown = dict(part.split("\n", 1) for part in result.stdout.split("== ")[1:])
    assert "Writing" in shown["convert"]
    assert "4 tokens" in shown["generate"]
    assert shown["server"].startswith("usage: ")
    assert shown["chat"].strip() and "FlashHead" in shown["benchmark"]


@pytest.mark.parametrize(
    "arguments, what, module, extra",
    [
        (("evaluate", "text", "--text", "a"), "mlx_flashhead.evaluate", "rich", "report"),
        (("evaluate", "text", "--text", "a", "--plot", "a.png"), "--plot", "matplotlib", "report"),
        (("benchmark", "model"), "mlx_flashhead.benchmark", "rich", "report"),
        (("benchmark", "model", "--plot", "a.svg"), "--plot", "matplotlib", "report"),
        (("export", "--output", "a.safetensors"), "mlx_flashhead.export", "rich", "report"),
    ],
)
def test_a_missing_module_is_named_with_its_extra(
    refused, monkeypatch, arguments, what, module, extra
):
    """Before any work: the model is not looked for."""
    monkeypatch.setitem(sys.modules, module, None)
    said = refused(*arguments, "--model", "./absent")
    assert said == (
        f"error: {what} needs {module}, which is not installed: "
        f"pip install 'mlx_flashhead[{extra}]'."
    )


README = Path(__file__).parents[2] / "README.md"


def test_the_sample_prints_an_answer_of_the_chat(converted, tmp_path, monkeypatch, capsys):
    (tmp_path / "mlx-community").mkdir()
    (tmp_path / "mlx-community" / "gemma-3-1b-it-4bit").symlink_to(converted)
    monkeypatch.chdir(tmp_path)
    sample = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {}
    exec(sample, names)
    assert capsys.readouterr().out.strip()
    asked = names["tokenizer"].decode(names["prompt"])
    assert "What is a prime number?" in asked and asked != "What is a prime number?"
