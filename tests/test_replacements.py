"""Names of other packages are replaced in one folder, and nowhere else."""

import ast
from pathlib import Path

import pytest

import mlx_flashhead

PACKAGE = Path(mlx_flashhead.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "interop" not in file.parts)
CHANGES = ("setattr", "delattr", "put_in_place")


def bound_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The names that an import gives a file."""
    names = set()
    for each in node.names:
        if each.asname is None:
            names.add(each.name)
        else:
            names.add(each.asname)
    return names


def foreign_names(tree: ast.Module) -> set[str]:
    """The names of a file that are another package's modules, classes or functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.split(".")[0] for name in bound_names(node)}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= bound_names(node)
        elif isinstance(node, ast.ImportFrom) and node.module and "compat" in node.module:
            # These are mlx-lm's names.
            names |= bound_names(node)
    # These are a command's own streams and hooks.
    return names - {"sys"}


def root(node: ast.AST) -> str:
    """The name at the beginning of ``a.b.c`` or ``vars(a)[b]``."""
    while True:
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
            node = node.value
        elif isinstance(node, ast.Call) and node.args:
            node = node.args[0]
        else:
            return getattr(node, "id", "")


def replaced(source: str) -> list[int]:
    """The lines in which a name of another package gets a value."""
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    lines = []
    for node in ast.walk(tree):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [t for t in node.targets if isinstance(t, ast.Attribute)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = []
            if isinstance(node.target, ast.Attribute):
                targets = [node.target]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in CHANGES:
            targets = [node.args[0]]
        if any(root(target) in foreign for target in targets):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_name_of_another_package_is_replaced(file):
    assert replaced(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "mlx_lm.generate.generate_step = other",
        "setattr(generate, 'BatchGenerator', other)",
        "del mlx_lm.generate",
        "KVCache.update_and_fetch = other",
        "compat.module.generate_step = other",
    ],
)
def test_a_replacement_would_be_seen(line):
    imports = (
        "import mlx_lm\nfrom mlx_lm import generate\nfrom mlx_lm.models.cache import KVCache\n"
        "from ..models.compat import mlx_lm as compat\n"
    )
    assert replaced(imports + line) == [5]
