"""scripts/check_mac.py: what it runs on a Mac, and that a failure there reads like an issue."""

import importlib
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

import check_mac
from check_mac import CHECKS, run_check

CHECKOUT = Path(check_mac.__file__).parents[1]


class Runner:
    """Stands in for subprocess.run: what was run, and an answer for the commands of a program."""

    def __init__(self, **answers):
        self.answers = answers
        self.ran = []

    def __call__(self, arguments, **options):
        line = shlex.join(arguments)
        self.ran.append(line)
        for word, (code, output) in self.answers.items():
            if word in line:
                return SimpleNamespace(returncode=code, stdout=output)
        return SimpleNamespace(returncode=0, stdout="ok\n")


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which MLX finds a GPU."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9"}, raising=False)


def test_both_systems_are_built_for():
    run = Runner()
    passed, page = run_check("compile", run)
    assert passed and page.startswith("# compile: Apple's compiler accepts the kernels' file")
    assert [line.split()[2] for line in run.ran] == ["macosx", "iphoneos"]
    assert all((CHECKOUT / line.split(" -c ")[1].split()[0]).is_file() for line in run.ran)
    run = Runner()
    assert run_check("swift", run)[0]
    assert [line.rstrip("'").rpartition("=")[2] for line in run.ran] == ["macOS", "iOS"]
    folder = run.ran[0].partition("cd ")[2].split()[0]
    assert (CHECKOUT / folder / "Package.swift").is_file()


def test_a_compiler_s_error_is_an_issue():
    error = "metal/flash_head.metal:12:3: error: unknown type name 'bfloat17'\n"
    passed, page = run_check("compile", Runner(iphoneos=(1, error)))
    assert not passed
    title, *_ = page.splitlines()
    assert title.startswith("# Mac: compile fails on ") and "mlx " in title
    assert "xcrun -sdk iphoneos metal -std=metal3.1 -fno-fast-math -c" in page
    assert error in page and "exit code 1" in page
    assert "scripts/check_mac.sh compile" in page
    for fact in ("processor", "Xcode", "Metal compiler", "mlx-lm", "commit"):
        assert f"| {fact} |" in page


def test_without_a_gpu_nothing_is_run(monkeypatch):
    """Else the kernels' tests would pass on the emulator, which says nothing of a Mac."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    for name in ("kernels", "tokens", "benchmark"):
        run = Runner()
        passed, page = run_check(name, run)
        assert not passed and not run.ran and "MLX finds no Metal device" in page


def test_all_files_that_run_kernels_are_tested_and_a_long_output_is_cut_to_its_end(gpu):
    output = "".join(f"line {i}\n" for i in range(500)) + "step 1\rstep 2\rFAILED test_kernels\n"
    run = Runner(pytest=(1, output))
    passed, page = run_check("kernels", run)
    for name in ("head/test_kernels", "head/test_kernel_costs", "models/test_kernel_generation"):
        assert f"tests/{name}.py" in run.ran[0]
    assert not passed
    assert f"the last {check_mac.LINES} of 501 lines" in page
    assert "line 499\nFAILED test_kernels\n" in page and "line 400\n" not in page


def test_tokens_stop_at_the_first_command_that_fails(gpu):
    run = Runner(convert=(2, "error: no space.\n"))
    passed, page = run_check("tokens", run)
    assert not passed and "error: no space." in page
    assert "fetch_model.py" in run.ran[0] and len(run.ran) == 2
    run = Runner()
    assert run_check("tokens", run)[0]
    assert "compare_paths.py" in run.ran[-1] and len(run.ran) == 3


@pytest.mark.parametrize("line", CHECKS["tokens"].commands + CHECKS["benchmark"].commands)
def test_commands_are_those_that_there_are(monkeypatch, capsys, line):
    """Each is known by its parser: it is asked for its help."""
    _, *words = shlex.split(line)
    flags = [word for word in words if word.startswith("--")]
    upto = words.index(flags[0]) if flags else 1
    module = words[0] == "-m"
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a script puts the checkout first
    monkeypatch.setattr(sys, "argv", [words[0], *words[1 + module : upto], "--help"])
    with pytest.raises(SystemExit) as end:
        if module:
            importlib.import_module(words[1]).main()
        else:
            runpy.run_path(str(CHECKOUT / words[0]), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(flag in shown for flag in flags)


def test_a_benchmark_of_a_virtual_machine_says_what_its_times_mean(gpu):
    passed, page = run_check("benchmark", Runner(benchmark=(0, "12.3 ms\n")))
    assert passed and "12.3 ms" in page and "the times below mean nothing" in page


def test_pages_are_written_and_shown_on_github(run, monkeypatch, tmp_path):
    pages = {"compile": (True, "# fine\n"), "kernels": (False, "# Mac: kernels fail\n")}
    monkeypatch.setattr(check_mac, "run_check", pages.get)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    code, said, _ = run(check_mac, "compile", "kernels", "--report", tmp_path / "pages")
    assert code == 1 and "Failed: kernels. Send" in said
    assert {p.name for p in (tmp_path / "pages").iterdir()} == {"compile.md", "kernels.md"}
    summary = (tmp_path / "summary.md").read_text()
    assert "# fine" in summary and "# Mac: kernels fail" in summary
    assert "All is well" in run(check_mac, "compile", "--report", tmp_path / "pages")[1]


def test_refused(run, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for arguments, said in ((["speed"], "no check 'speed'"), ([], "need a Mac")):
        code, _, errors = run(check_mac, *arguments)
        assert code == 2 and said in errors
