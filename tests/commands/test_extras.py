"""A plain installation: what it does without the extras, and how the missing one is named."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
OF_EXTRAS = ("rich", "matplotlib", "prompt_toolkit", "segno", "llguidance", "lm_eval")
# None in sys.modules makes an import fail as that of a module that is not installed.
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split()))
sys.path.insert(0, {str(CHECKOUT)!r})
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def plainly(command, *arguments, but=(), **options):
    """Standard output of a command that runs without what the extras bring, and must succeed.

    Args:
        command: Its name.
        *arguments: Of the command line.
        but: Modules that are there all the same.
        **options: Of ``subprocess.run``.
    """
    hidden = " ".join(name for name in OF_EXTRAS if name not in but)
    process = [sys.executable, "-c", RUN, hidden, f"mlx_flashhead.{command}", *map(str, arguments)]
    result = subprocess.run(process, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_model_is_converted_and_generates(dense, tmp_path):
    flash = tmp_path / "flash"
    how = ("--hf-path", dense, "--mlx-path", flash, "--calibration", "none")
    assert "Writing" in plainly("convert", *how)
    how = ("--model", flash, "--max-tokens", 4)
    assert "4 tokens" in plainly("generate", *how, "--prompt", "One day")
    assert plainly("server", "--help").startswith("usage: ")
    # mlx-lm's own chat, whose flags these are, imports rich
    assert plainly("chat", *how, but=("rich",), input="One day\n").strip()
    timed = ("--shape", "512,64", "--n-probes", 4, "--rounds", 1)
    assert plainly("benchmark", "head", *timed, but=("rich",))


@pytest.mark.parametrize(
    "arguments, what, module, extra",
    [
        (("evaluate", "text", "--text", "a"), "mlx_flashhead.evaluate", "rich", "report"),
        (("evaluate", "text", "--text", "a", "--plot", "a.png"), "--plot", "matplotlib", "report"),
        (("evaluate", "tasks", "--tasks", "a"), "mlx_flashhead.evaluate tasks", "lm_eval", "tasks"),
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
