"""Checks FlashHead on a Mac. A failure reads like an issue and can be sent as it is.

    scripts/check_mac.sh [CHECK …] [--report FOLDER]

compile    the kernels' file by itself, for macOS and for iOS, by Apple's compiler
swift      the Swift package, for macOS and for iOS, by Xcode
kernels    the kernels' tests, on the GPU
tokens     a real model's tokens, on the kernels and on plain MLX
benchmark  a report of speed

Each check writes a page into the folder of reports. The page of a failed check has the command, the
machine and the output, and the script ends with 1.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)  # works uninstalled too

import mlx.core as mx

from mlx_flashhead.common.command import command

PYTHON = shlex.quote(sys.executable)
MODEL = "models/SmolLM2-135M-Instruct"
LINES = 80  # of a failed command's output
NO_TIMES = (
    "On a virtual machine, such as GitHub's, the times below mean nothing, since its GPU is "
    "shared. They show that the command works."
)
METAL = "metal -std=metal3.1 -fno-fast-math -c metal/flash_head.metal -o /dev/null"
XCODE = (
    "xcodebuild build -scheme FlashHead-Package -skipMacroValidation -skipPackagePluginValidation "
    "-destination generic/platform="
)
KERNEL_TESTS = sorted(
    str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "tests").rglob("test_*kernel*.py")
)


@dataclass(frozen=True)
class Check:
    """An expectation in a few words, and commands that run in order until one fails."""

    what: str
    commands: tuple[str, ...]
    advice: str  # where to look if it fails
    needs_gpu: bool = True
    kept: str = ""  # text above the output, which is then kept if the check passes too


CHECKS = {  # in the order of their run
    "compile": Check(
        "Apple's compiler accepts the kernels' file",
        (f"xcrun -sdk macosx {METAL}", f"xcrun -sdk iphoneos {METAL}"),
        "The compiler names the file and the line in metal/. If its toolchain is missing: "
        "xcodebuild -downloadComponent MetalToolchain.",
        needs_gpu=False,
    ),
    "swift": Check(
        "Xcode builds the Swift package",
        # xcodebuild takes the package of its folder
        tuple(f"sh -c 'cd metal/swift && {XCODE}{system}'" for system in ("macOS", "iOS")),
        "The compiler names the line in metal/swift. mlx-swift 0.31.6 needs Xcode 26 with "
        "Swift 6.3.",
        needs_gpu=False,
    ),
    "kernels": Check(
        "the kernels compute the same as numpy",
        (f"{PYTHON} -m pytest -q -rs --tb=short {shlex.join(KERNEL_TESTS)}",),
        "A failed test names kernel, shape, dtype and format. MTL_SHADER_VALIDATION=1 before "
        "the command lets Metal check every access.",
    ),
    "tokens": Check(
        "a real model generates the same tokens on the kernels and on plain MLX",
        (
            f"{PYTHON} scripts/fetch_model.py smollm2 {MODEL}",
            # few positions are enough, since the two paths are compared with each other
            f"{PYTHON} -m mlx_flashhead.convert --hf-path {MODEL} --mlx-path {MODEL}-checked "
            "--overwrite --calibration-positions 400",
            f"{PYTHON} scripts/compare_paths.py --model {MODEL}-checked",
        ),
        "The first token that differs is named with both logits. If the kernels' tests pass, "
        "look at this model's shapes, which those tests lack.",
    ),
    "benchmark": Check(
        "the benchmark runs and writes its report",
        (
            f"{PYTHON} -m mlx_flashhead.benchmark head --shape llama-3.2-1b --dtype bfloat16 "
            "--head-bits 4 --report",
        ),
        "It times the kernels with mx.synchronize around them: see common/timing.py.",
        kept=NO_TIMES,
    ),
}


def this_mac() -> list[tuple[str, str]]:
    """The facts at the head of a report."""
    gpu = "none that MLX finds"
    if mx.metal.is_available():
        gpu = str(mx.device_info().get("device_name", "found by MLX, without a name"))
    return [
        ("processor", _said("sysctl", "-n", "machdep.cpu.brand_string")),
        ("GPU", gpu),
        ("system", f"macOS {platform.mac_ver()[0]} ({platform.machine()})"),
        ("Xcode", _said("xcodebuild", "-version")),
        ("Metal compiler", _said("xcrun", "-sdk", "macosx", "metal", "--version")),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in ("mlx", "mlx-lm")),
        ("commit", _said("git", "rev-parse", "--short", "HEAD")),
    ]


def run_check(name: str, run: Callable = subprocess.run) -> tuple[bool, str]:
    """Runs the commands of one check: whether it passes, and its page."""
    check = CHECKS[name]
    if check.needs_gpu and not mx.metal.is_available():
        page = failure(name, "", "MLX finds no Metal device: mx.metal.is_available() is False.")
        return False, page
    output = ""
    for line in check.commands:
        print(f"$ {line}", flush=True)
        start = time.monotonic()
        words = shlex.split(line)
        try:
            done = run(
                words, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            code, output = done.returncode, _without_progress(done.stdout)
        except OSError as error:
            code, output = 127, f"{words[0]}: {error.strerror}\n"
        print(output, end="", flush=True)
        print(f"[exit code {code}, {time.monotonic() - start:.0f} s]", flush=True)
        if code:
            return False, failure(name, line, output, code)
    title = f"# {name}: {check.what}\n\n{_table(this_mac())}\n"
    return True, title + (f"\n{check.kept}\n\n{output}" if check.kept else "")


def failure(name: str, line: str, output: str, code: int = 1) -> str:
    """A failed check as an issue: title, expectation, command, output, machine, advice."""
    facts = dict(this_mac())
    lines = output.rstrip().splitlines()
    shown = "\n".join(lines[-LINES:])
    cut = f" (the last {LINES} of {len(lines)} lines)" if len(lines) > LINES else ""
    where = f"{facts['processor']}, {facts['system']}, mlx {facts['mlx']}"
    parts = [f"# Mac: {name} fails on {where}", f"Expected: {CHECKS[name].what}."]
    if line:
        again = f"scripts/check_mac.sh {name}"
        line = line.replace(PYTHON, ".venv-test/bin/python")
        parts.append(f"To see it again: `{again}`, or this part alone:\n\n```\n{line}\n```")
        parts.append(f"It ends with exit code {code}{cut}:")
    parts += [f"```\n{shown}\n```", _table(list(facts.items()))]
    return "\n\n".join([*parts, f"Where to look: {CHECKS[name].advice}"]) + "\n"


def _without_progress(output: str) -> str:
    """The text that is left on the screen of a line that progress bars have overwritten."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.split("\n"))


def _said(*arguments: str) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=CHECKOUT)
    except OSError:
        return "not installed"
    return " ".join((done.stdout or done.stderr).split()) or "says nothing"


def _table(facts: list[tuple[str, str]]) -> str:
    rows = (f"| {name} | {' '.join(value.split())} |" for name, value in facts)
    return "\n".join(["| | |", "|---|---|", *rows])


@command
def main() -> None:
    """Entry point of ``scripts/check_mac.sh``."""
    parser = argparse.ArgumentParser(
        prog="scripts/check_mac.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (default)."
    )
    parser.add_argument("--report", default="mac-report", metavar="FOLDER", help="For the pages.")
    args = parser.parse_args()
    unknown = [name for name in args.checks if name not in CHECKS]
    if unknown:
        raise ValueError(f"There is no check {unknown[0]!r}: choose from {', '.join(CHECKS)}.")
    if sys.platform != "darwin":
        raise ValueError(
            "These checks need a Mac: elsewhere scripts/test.sh runs the kernels on an emulator."
        )
    folder = Path(args.report)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.checks or CHECKS:
        passed, page = run_check(name)
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(summary, "a", encoding="utf-8") as file:
                file.write(page + "\n")
        if not passed:
            failed.append(name)
            print(f"\n{page}", flush=True)
    if failed:
        print(f"Failed: {', '.join(failed)}. Send {folder}/{failed[0]}.md as an issue.")
        sys.exit(1)
    print(f"All is well. The pages are in {folder}.")


if __name__ == "__main__":
    main()
