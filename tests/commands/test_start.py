"""How the commands start and end, without the extras too, and the README's sample."""

import errno
import importlib
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
from mlx_flashhead.version import __version__

CHECKOUT = Path(__file__).parents[2]
REMEDIES = (
    (errno.ENOSPC, "free some space or choose another place"),
    (errno.EACCES, "choose another place, or get the permission"),
    (errno.EIO, "check the path and the disk"),
)


def start(*command, **options):
    """(exit code, standard output, standard error) of a process, as from a user's shell."""
    quiet = ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_VERBOSITY")
    options["env"] = {name: value for name, value in os.environ.items() if name not in quiet}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    return result.returncode, result.stdout, result.stderr


# As `python -m` does, but in one process; and as `python scripts/convert.py` of a clone.
HELP = f"""
import runpy, sys

def show_help(run, name, **options):
    sys.argv = ['-m', '--help']
    try:
        run(name, run_name='__main__', **options)
    except SystemExit as end:
        assert end.code == 0, name

for name in {[*COMMANDS]}:
    show_help(runpy.run_module, f'mlx_flashhead.{{name}}', alter_sys=True)
show_help(runpy.run_path, {str(CHECKOUT / "scripts" / "convert.py")!r})
print(sorted({{'mlx_lm', 'mlx_vlm', 'transformers'}} & {{*sys.modules}}))
"""


def test_help_of_all_commands_imports_no_library_of_models(tmp_path):
    """And no module warns. Such a library takes a second or more."""
    program = (sys.executable, "-W", "error::RuntimeWarning", "-c", HELP)
    code, output, errors = start(*program, cwd=tmp_path)
    assert (code, errors) == (0, "") and output.splitlines()[-1] == "[]"
    used = [line.split()[1] for line in output.splitlines() if line.startswith("usage: ")]
    assert used == [f"mlx_flashhead.{command}" for command in (*COMMANDS, "convert")]


COMMANDS_THAT_LOAD = {
    "generate": ["--model", "{model}"],
    "chat": ["--model", "{model}"],
    "convert": ["--model", "{model}", "--mlx-path", "{new}"],
    "cache": ["--measure"],
}


@pytest.mark.parametrize(
    "command, module",
    [
        ("generate", "mlx_flashhead.common.command"),
        ("generate", "mlx"),
        ("chat", "mlx"),
        *((command, "transformers.utils") for command in COMMANDS_THAT_LOAD),
    ],
)
def test_ctrl_c_during_the_imports_ends_without_a_traceback(dense, tmp_path, command, module):
    """Before the command's ``main`` runs, and within it."""
    flags = [f.format(model=dense, new=tmp_path / "new") for f in COMMANDS_THAT_LOAD[command]]
    words = ["-X", "importtime", "-m", f"mlx_flashhead.{command}", *flags]
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as process:
        while not process.stderr.readline().endswith(f" {module}\n"):
            pass
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert "Traceback" not in errors and "\nInterrupted.\n" in errors
    assert process.returncode == 130 and not (tmp_path / "new").exists()


def test_console_script_generates_and_prints_nothing_else(run, converted):
    """No library's notice: all that is on the screen is the answer."""
    script = Path(sysconfig.get_path("scripts")) / "mlx_flashhead.generate"
    assert script.exists(), "install the package first: pip install -e ."
    arguments = ("--model", converted, "--max-tokens", 5, "--verbose", "F")
    arguments += ("--flash-head-always", "--prompt")
    expected = run("generate", *arguments, "One day")
    assert start(script, *arguments, "-", input="One day") == expected
    assert expected[::2] == (0, "")


@pytest.mark.parametrize(
    "command", ["generate", "chat", "convert", "export", "evaluate", "benchmark"]
)
def test_how_commands_end(run, monkeypatch, command):
    module = importlib.import_module(f"mlx_flashhead.{command}")
    for error, code, said in (
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
        (BrokenPipeError(), 141, ""),
        (ValueError("No \x1b[31mname\x07\x9b.\nA second line."), 2, "error: No [31mname.\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (OSError("No disk."), 2, "error: No disk.\n"),
        *((OSError(n, os.strerror(n), "file"), 2, f"{os.strerror(n)}: {r}") for n, r in REMEDIES),
    ):
        monkeypatch.setattr(module, "make_parser", Mock(side_effect=error))
        ended, output, errors = run(command)
        assert (ended, output) == (code, "") and errors in (said, f"error: file: {said}.\n")


def test_the_package_is_a_command(run, refused):
    code, shown, _ = run("__main__", "--help")
    assert code == 0 and shown.startswith("usage: mlx_flashhead COMMAND …\n")
    assert all(f"  {command}" in shown for command in COMMANDS)
    assert run("__main__", "--version") == (0, f"{__version__}\n", "")
    assert "there is no command none: choose one of gen" in refused("__main__", "none")
    words = ("__main__", "generate", "--model", "./absent")
    assert "There is no folder ./absent: check the " in refused(*words)


OF_EXTRAS = ("rich", "matplotlib", "prompt_toolkit", "segno", "llguidance")
# None in sys.modules makes an import fail as that of a module that is not installed.
RUN = f"""
import runpy, sys

sys.modules.update(dict.fromkeys({OF_EXTRAS!r}))
for line in sys.argv[1:]:
    command, *arguments = line.split()
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
    flash = tmp_path / "flash"
    commands = [
        f"convert --hf-path {dense} --mlx-path {flash} --calibration none",
        f"generate --model {flash} --max-tokens 4 --prompt One",
        "server --help",
        f"chat --model {flash} --max-tokens 4",
        "benchmark head --shape 512,64 --n-probes 4 --rounds 1",
    ]
    code, output, errors = start(sys.executable, "-c", RUN, *commands, input="One day\n")
    assert code == 0, errors
    shown = dict(part.split("\n", 1) for part in output.split("== ")[1:])
    assert "Writing" in shown["convert"] and "4 tokens" in shown["generate"]
    assert shown["server"].startswith("usage: ")
    assert shown["chat"].strip() and "FlashHead" in shown["benchmark"]


@pytest.mark.parametrize(
    "line, what, module, extra",
    [
        ("evaluate text --text a", "mlx_flashhead.evaluate", "rich", "report"),
        ("benchmark model --plot a.svg", "--plot", "matplotlib", "plot"),
    ],
)
def test_a_missing_module_is_named_with_its_extra(refused, monkeypatch, line, what, module, extra):
    """Before any work: the model is not looked for."""
    monkeypatch.setitem(sys.modules, module, None)
    said = refused(*line.split(), "--model", "./absent")
    install = f"pip install 'mlx_flashhead[{extra}]'"
    assert said == f"error: {what} needs {module}, which is not installed: {install}."


def test_the_sample_prints_an_answer_of_the_chat(converted, tmp_path, monkeypatch, capsys):
    (tmp_path / "mlx-community").mkdir()
    (tmp_path / "mlx-community" / "gemma-3-4b-it-qat-4bit").symlink_to(converted)
    monkeypatch.chdir(tmp_path)
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    sample = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    names = {}
    exec(sample, names)
    assert capsys.readouterr().out.strip()
    prompt = names["tokenizer"].decode(names["prompt"])
    assert "What is a prime number?" in prompt and prompt != "What is a prime number?"
