"""Names what of the package only a GPU takes and no test runs.

    python scripts/device_lines.py                        # all tests without the real model
    python scripts/device_lines.py tests/head tests/wide  # beside tests/mac, only these

Two runs are measured by coverage: the tests as they are, on a CPU, and those of ``tests/mac``, on a
pretended GPU. Each place that asks for the device must be reached by one of ``tests/mac``, which
takes it as a Mac does. Each line of the functions that ask, and of the files in ``BEHIND``, must be
run by a test, or has its reason in ``NOT_RUN``. Needs the extra ``test``.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "mlx_flashhead"
MAC = "tests/mac"
# Functions whose answer is the device's.
QUESTIONS = {
    "default_device",
    "device_info",
    "device_name",
    "differs_among_others",
    "gpu_is_default",
    "is_available",
    "may_use_tf32",
    "numpy_is_faster",
}
# Files that hold what lies behind the answers.
BEHIND = (
    "decoding/measuring/rehearsal.py",
    "head/dense_kernels.py",
    "head/kernel_inputs.py",
    "head/kernel_texts.py",
    "head/kernels.py",
    "head/metal_operations.py",
    "head/rounded_product.py",
    "head/row_products.py",
    "head/stored_rows.py",
    "head/kernel_trial.py",
    "wide/trial.py",
)
# Places that ask which no test of tests/mac reaches, and lines that no test runs: by a file, the
# text of the statement's first line, and why.
MLX_0_32_3 = "mlx up to 0.32.3, and rows of one bit: test_rounded_product.py has its bounds"
MLX_LM_0_31 = "mlx-lm 0.31 alone, which scripts/test.sh --oldest installs"
NOT_RUN: dict[tuple[str, str], str] = {
    (
        "models/compat/mlx_lm_0_31.py",
        "def maybe_set_recommended_wired_limit() -> int | None:",
    ): MLX_LM_0_31,
    (
        "models/compat/mlx_lm_0_31.py",
        'recommended = mx.device_info().get("max_recommended_working_set_size")',
    ): MLX_LM_0_31,
    (
        "models/compat/mlx_lm_0_31.py",
        "return None if recommended is None else mx.set_wired_limit(int(recommended))",
    ): MLX_LM_0_31,
    (
        "benchmarks/reporting.py",
        'return "OpenBLAS"',
    ): "only where OpenBLAS is preloaded",
    (
        "head/rounded_product.py",
        "sums = RoundedSums(product_dtype, kernel.added, rows.group_size, longest_offsets)",
    ): MLX_0_32_3,
    (
        "head/rounded_product.py",
        "allowed = allowed + sums.tolerance(hidden[:N_STATES])[:, None]",
    ): MLX_0_32_3,
}
SETTINGS = "[run]\nsource = mlx_flashhead\n"


class Place(NamedTuple):
    """A statement of the package.

    Attributes:
        file: Its path below the package.
    """

    file: str
    line: int

    @property
    def text(self) -> str:
        """Its first line."""
        return (PACKAGE / self.file).read_text(encoding="utf-8").splitlines()[self.line - 1].strip()

    @property
    def reason(self) -> str | None:
        """Why no test runs it, if that is known."""
        return NOT_RUN.get((self.file, self.text))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def pytest_runtest_protocol(item: Any) -> None:
    """Notes which test runs the lines that follow: this module is a plugin of both runs."""
    from coverage import Coverage

    current = Coverage.current()
    if current is not None:
        current.switch_context(item.nodeid.partition("[")[0])


def measure(data: Path, arguments: list[str]) -> bool:
    """Runs tests under coverage, whose data goes to a file. Returns whether all have passed."""
    settings = data.with_suffix(".ini")
    settings.write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}"]
    command += [f"--data-file={data}", "-m", "pytest", "-q", "-p", "device_lines", *arguments]
    places = os.pathsep.join(map(str, (CHECKOUT, CHECKOUT / "scripts")))
    done = subprocess.run(command, cwd=CHECKOUT, env=os.environ | {"PYTHONPATH": places})
    return done.returncode == 0


def questions() -> Iterator[tuple[Place, range]]:
    """The statements that ask for the device, each with the lines of its function."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found: dict[int, range] = {}
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                lines = range(function.lineno, (function.end_lineno or 0) + 1)
                for statement in ast.walk(function):
                    if isinstance(statement, ast.stmt) and any(map(_asks, _own_parts(statement))):
                        # The innermost function comes last.
                        found[statement.lineno] = lines
        for line, lines in sorted(found.items()):
            yield Place(file, line), lines


def _own_parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """The parts of a statement, without those of the statements within it."""
    waiting = list(ast.iter_child_nodes(statement))
    while waiting:
        part = waiting.pop()
        if not isinstance(part, ast.stmt):
            yield part
            waiting += ast.iter_child_nodes(part)


def _asks(part: ast.AST) -> bool:
    """Whether an expression asks for the device, or for the backend that follows from it."""
    if isinstance(part, ast.Call):
        name = getattr(part.func, "attr", getattr(part.func, "id", None))
        return name in QUESTIONS
    compared = isinstance(part, ast.Compare)
    return compared and any(getattr(side, "id", "") == "METAL" for side in part.comparators)


def tests_of(data: Any, place: Place) -> list[str]:
    """The tests that have run a statement."""
    by_line = data.contexts_by_lineno(str(PACKAGE / place.file))
    names = {name.rpartition("/")[2] for name in by_line.get(place.line, ()) if name}
    return sorted(names)


def unrun(coverages: list[Any], file: str) -> set[Place]:
    """The statements of a file that none of some runs has run."""
    by_run = [set(each.analysis2(str(PACKAGE / file))[3]) for each in coverages]
    return {Place(file, line) for line in set.intersection(*by_run)}


def main() -> None:
    """Measures both runs, and prints what they show; ends with 1 where a place has no test."""
    from coverage import Coverage

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="Files and folders of tests on the CPU.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("cpu", "mac")]
        ordinary = [*(args.tests or ["tests"]), "-m", "not real", f"--ignore={MAC}"]
        passed = [measure(files[0], ordinary), measure(files[1], [MAC])]
        coverages = [Coverage(data_file=file, config_file=False) for file in files]
        for each in coverages:
            each.load()
        asked = list(questions())
        tests = {place: tests_of(coverages[1].get_data(), place) for place, _ in asked}
        lines = {place for file in BEHIND for place in unrun(coverages, file)}
        for place, function in asked:
            lines |= {each for each in unrun(coverages, place.file) if each.line in function}
    print(f"\n== {len(asked)} places ask for the device. A test of {MAC} that reaches each:")
    for place, names in tests.items():
        found = place.reason or "NONE"
        if names:
            found = names[0]
        print(f"{place}\n    {found}")
    print(f"\n== {len(lines)} lines of their functions, or behind them, are run by no test:")
    for place in sorted(lines):
        print(f"{place}\n    {place.reason or 'NO REASON'}")
    lines |= {place for place, names in tests.items() if not names}
    untested = [place for place in lines if place.reason is None]
    if untested:
        sys.exit(f"{len(untested)} places have neither a test nor a reason.")
    if not all(passed):
        sys.exit("A test has failed, so that more lines may be without one.")


if __name__ == "__main__":
    main()
