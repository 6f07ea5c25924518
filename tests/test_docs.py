"""The pages: links lead somewhere, promises have tests, and the map is the tree on disk."""

import re
from itertools import takewhile
from pathlib import Path

import pytest

import apple_estimates

CHECKOUT = Path(__file__).parent.parent
PATTERNS = ("*.md", ".github/**/*.md", "docs/*.md", "metal/*.md", "tests/data/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in CHECKOUT.glob(pattern))
LINK = re.compile(r"\]\(([^)\s]+)\)")


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
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in anchors(target), f"{page}: {link}"


def mapped_paths(text):
    """Paths of the map: a line's names lie in the folder above it that is indented less."""
    paths, above = set(), []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        names = list(takewhile(lambda word: word.endswith(("/", ".py")), line.split()))
        above = [(depth, folder) for depth, folder in above if depth < indent]
        base = above[-1][1] if above else CHECKOUT
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
    package, tests = CHECKOUT / "mlx_flashhead", CHECKOUT / "tests"
    folders = {path.name: path for path in tests.iterdir() if path.is_dir()}
    mirrored = {path.name for path in package.iterdir()} | {"scripts"}
    there = {path.parent for path in package.glob("*/*.py")} | {*package.glob("*.py")}
    there |= {path for name, path in folders.items() if name not in mirrored}
    unmapped = [path for path in there - mapped if path.name != "__pycache__"]
    assert unmapped == [], "name it in CONTRIBUTING.md"


def test_the_pages_have_the_estimates():
    for (name, marker), lines in apple_estimates.BLOCKS.items():
        text = (CHECKOUT / name).read_text(encoding="utf-8")
        assert apple_estimates.with_block(text, marker, lines()) == text, name
