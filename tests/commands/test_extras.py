"""A plain installation: what it does without the extras, and how the missing one is named."""

import json
import subprocess
import sys

import pytest

OF_EXTRAS = ("rich", "matplotlib", "prompt_toolkit", "segno", "llguidance", "lm_eval")
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
