"""The pages: links lead somewhere, promises have tests, and the map is the tree on disk."""

import json
import re
import tomllib
from itertools import takewhile
from pathlib import Path

import pytest

import apple_estimates
import step_times
from pages import with_block

CHECKOUT = Path(__file__).parent.parent
PATTERNS = ("*.md", ".github/**/*.md", "docs/*.md", "metal/*.md", "tests/data/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in CHECKOUT.glob(pattern))
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file in backticks, whose path begins at one of these folders.
NAMED = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|sh|swift|h|metal|toml|txt|csv|yml))`")
NAMED_IN = (".", "mlx_flashhead", "metal", "scripts", "tests")


def without_code(page):
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(without_code(page)):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page
        if name:
            target = (page.parent / name).resolve()
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_file_that_a_page_names_exists(page):
    for name in NAMED.findall(without_code(page)):
        assert any((CHECKOUT / folder / name).exists() for folder in NAMED_IN), name


def mapped_paths(text):
    """Paths of the map: a line's names lie in the folder above it that is indented less."""
    paths = set()
    above = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        names = list(takewhile(lambda word: word.endswith(("/", ".py")), line.split()))
        above = [(depth, folder) for depth, folder in above if depth < indent]
        base = CHECKOUT
        if above:
            base = above[-1][1]
        paths |= {base / name for name in names}
        above.append((indent, base / names[0]))
    return paths


def test_every_promise_of_the_readme_has_its_tests():
    """A line of CONTRIBUTING has a promise in the README's words, and tests that exist."""
    readme = " ".join((CHECKOUT / "README.md").read_text(encoding="utf-8").split())
    section = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = section.partition("## Promises and their tests")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (`.+`) \|$", section, flags=re.MULTILINE)
    assert len(rows) >= 10
    for promise, tests in rows:
        assert promise in readme, promise
        for path, name in re.findall(r"`([^`]+?)::(\w+)`", tests):
            source = (CHECKOUT / path).read_text(encoding="utf-8")
            assert re.search(rf"^ *def {name}\(", source, flags=re.MULTILINE), f"{path}::{name}"


def test_the_map_of_contributing_is_the_tree_on_disk():
    section = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("What is where")
    mapped = mapped_paths(re.search(r"```\n(.*?)\n```", section[2], re.DOTALL)[1])
    assert [path for path in mapped if not path.exists()] == []
    package = CHECKOUT / "mlx_flashhead"
    tests = CHECKOUT / "tests"
    folders = {path.name: path for path in tests.iterdir() if path.is_dir()}
    mirrored = {path.name for path in package.iterdir()} | {"scripts"}
    there = {path.parent for path in package.glob("*/*.py")} | {*package.glob("*.py")}
    there |= {path for name, path in folders.items() if name not in mirrored}
    unmapped = [path for path in there - mapped if path.name != "__pycache__"]
    assert unmapped == [], "name it in CONTRIBUTING.md"


def test_the_pages_have_the_estimates():
    for (name, marker), lines in apple_estimates.BLOCKS.items():
        text = (CHECKOUT / name).read_text(encoding="utf-8")
        assert with_block(text, marker, lines()) == text, name


def read(name):
    return (CHECKOUT / name).read_text(encoding="utf-8")


def test_the_readme_is_read_in_a_minute():
    readme = read("README.md")
    assert len(readme.splitlines()) <= 150
    commands = set(re.findall(r"mlx_flashhead\.(\w+)(?= )", readme))
    assert commands == {"chat", "server", "run", "benchmark"}
    assert readme.index("python3.12 -m venv .venv") < readme.index("**`mlx_flashhead.chat")
    rows = apple_estimates.readme()[2:]
    assert len(rows) == 2 * len(apple_estimates.README_MODELS)
    assert not any("dense" in row for row in rows)


def test_the_pages_figures_agree():
    """A figure that a page quotes is the one of the page or file that has it."""
    readme = read("README.md")
    comparison = read("docs/comparison.md")
    serves = re.search(r"serves (\d+) of the (\d+)", read("docs/architectures.md")).groups()
    assert "{} of mlx-lm's {} architectures".format(*serves) in readme
    for bits in (4, 8):
        chips = apple_estimates.README_CHIPS
        models = apple_estimates.README_MODELS
        gains = [step_times.gain(model, chip, bits) for model in models for chip in chips]
        least = min(gains)
        # A model that gains less stays dense.
        if least < 1.03:
            least = 1.0
        assert f"{least:.2f} to {max(gains):.2f} with {bits}-bit heads" in comparison
        large = max(step_times.gain("llama-3.1-8b", chip, bits) for chip in chips)
        assert f"{large:.2f}" in re.search(r"8 billion.*", read("docs/limits.md"))[0]
    cases = json.loads(read("docs/benchmarks/grid.json"))["cases"]
    measured = {
        case["bits"]: case["ratio"]["median"]
        for case in cases
        if (case["model"], case["request"], case["batch"]) == ("Gemma-3-270M", "greedy", 1)
    }
    assert f"with 32-bit weights is {measured[32]:.1f} times as fast" in readme
    assert f"{measured[32]:.1f} measured on a CPU" in comparison
    assert f"{measured[4]:.1f}" == "1.0"


def test_each_command_of_a_page_exists():
    scripts = tomllib.loads(read("pyproject.toml"))["project"]["scripts"]
    for page in PAGES:
        for text in re.findall(
            r"```(?:\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            for name in re.findall(r"(?<![\w./-])(mlx_flashhead\.\w+)(?= )", text):
                assert name in scripts, f"{page}: {name}"
