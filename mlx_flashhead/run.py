"""Runs another program, unchanged, with a FlashHead under its load of mlx-lm or mlx-vlm."""

import os
import shlex
import shutil
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from .common.arguments import Parser
from .common.command import command
from .common.flags import (
    add_always_option,
    add_draft_flags,
    add_head_options,
    add_lookup_flag,
    check_draft_flags,
)

LIBRARIES = ("mlx_lm", "mlx_vlm")
# Flags that may have a value.
OPTIONAL = ("--fine-head", "--mtp")
# What brings the programs of docs/integrations.md.
PACKAGES = {
    "llm": "llm-mlx",
    "mlx_vlm": "'mlx_flashhead[vlm]'",
    "mlx-openai-server": "mlx-openai-server",
    "mtplx": "mtplx",
    "omlx": "flyto-mlx",
    "rapid-mlx": "rapid-mlx",
    "vllm-mlx": "vllm-mlx",
}
CHECK_NAME = "check the name"


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.run``."""
    parser = Parser(
        prog="mlx_flashhead.run",
        description="Run another program with a FlashHead under its mlx_lm.load or mlx_vlm.load. "
        "Programs that it starts get it, too.",
        usage="mlx_flashhead.run [options] (-m MODULE | PROGRAM) [its arguments]",
    )
    add_head_options(parser)
    add_always_option(parser)
    unverified = "Use FlashHead's own choices, in loops that cannot be verified, too."
    parser.add_argument("--no-verify", action="store_true", help=unverified)
    add_lookup_flag(parser.add_argument)
    add_draft_flags(parser.add_argument)
    first = "Build a missing FlashHead before the first text (default: while nothing is written)."
    parser.add_argument("--build-first", action="store_true", help=first)
    check = "Print, at the program's end, how many tokens were verified, how many dense, and why."
    parser.add_argument("--check", action="store_true", help=check)
    hook = "Print environment variables that give any Python process, as of an app, a FlashHead."
    parser.add_argument("--hook", action="store_true", help=hook)
    parser.add_argument(
        "-m", dest="module", metavar="MODULE", help="Run a module, as python -m does."
    )
    program = "A Python file, an installed program, or a program of mlx-lm such as mlx_lm.server."
    parser.add_argument("program", nargs="?", metavar="PROGRAM", help=program)
    return parser


@command
def main() -> None:
    """This process becomes the program, which `interop/hook/sitecustomize` patches at its start."""
    parser = make_parser()
    words = _split(parser, sys.argv[1:])
    rest = sys.argv[1 + len(words) :]
    args = parser.parse_args(_with_empty_values(words))
    check_draft_flags(parser, args)
    if args.program and args.program.split(".")[0] in LIBRARIES and not Path(args.program).exists():
        args.module = args.program
        args.program = None
    if not (args.hook or args.module or args.program):
        parser.error("a program is needed, such as mlx_lm.server or -m MODULE")
    program: list[str] = []
    if args.program:
        program = _file(parser, args.program)
    elif args.module:
        program = _module(parser, args.module)
    from .loading.head_options import REFUSE, HeadOptions

    options = HeadOptions.from_flags(args)
    if args.no_build:
        options = replace(options, missing=REFUSE)
    if args.hook:
        for name, value in options.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        return
    if options.flash_head is not None:
        # A mistake is better said here than in the program.
        from .loading.sources import explicit_head

        explicit_head(options)
    os.execve(program[0], [*program, *rest], os.environ | options.environment())


def _split(parser: Parser, words: list[str]) -> list[str]:
    """The words up to the program's name. All later words are the program's."""
    with_value = {
        word for action in parser._actions if action.nargs is None for word in action.option_strings
    }
    i = 0
    while i < len(words):
        word = words[i]
        if word == "-m":
            return words[: i + 2]
        if not word.startswith("-"):
            return words[: i + 1]
        if word in with_value:
            i += 1
        i += 1
    return words


def _with_empty_values(words: list[str]) -> list[str]:
    """The words, with an empty value for a flag that may have one and has none.

    Without it such a flag would take the program for its value.
    """
    given = []
    for word in words:
        if word in OPTIONAL:
            word += "="
        given.append(word)
    return given


def _module(parser: Parser, name: str) -> list[str]:
    """The command that runs a module: as ``python -m`` does, or by its ``main``."""
    # As python -m does.
    sys.path[0] = os.getcwd()
    if not _can_be_run(name):
        package = name.partition(".")[0]
        remedy = CHECK_NAME
        if package and find_spec(package) is None:
            remedy = _installed_by(package)
        parser.error(f"there is no module {name} that can be run: {remedy}")
    if name.startswith("mlx_lm."):
        # -m would make a second module, with loops of its own.
        code = f"import sys; from {name} import main; sys.argv[0] = {name!r}; main()"
        return [sys.executable, "-c", code]
    return [sys.executable, "-m", name]


def _can_be_run(name: str) -> bool:
    """Whether there is a module of this name, or a package with a ``__main__``.

    Only the outermost package is looked for by Python's own means: `find_spec` of a module within
    a package imports the package.
    """
    package, *parts = name.split(".")
    if not package:
        return False
    spec = find_spec(package)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(part, spec.submodule_search_locations)
    if spec is None:
        return False
    inside = spec.submodule_search_locations
    return inside is None or PathFinder.find_spec("__main__", inside) is not None


def _installed_by(name: str) -> str:
    """What to do where a program or a package is not installed."""
    if name in PACKAGES:
        return f"pip install {PACKAGES[name]}"
    return CHECK_NAME


def _file(parser: Parser, name: str) -> list[str]:
    """The command that runs a path, or a name beside this Python, or one on PATH."""
    file = Path(name).expanduser()
    if file.is_file():
        file = file.resolve()
    else:
        installed = shutil.which(name, path=str(Path(sys.executable).parent))
        if installed is None:
            installed = shutil.which(name)
        if installed is None:
            parser.error(f"there is no file and no program {name}: {_installed_by(name)}")
        file = Path(installed)
    with file.open("rb") as opened:
        by_env = b"env python" in opened.readline(500)
    if by_env or file.suffix == ".py":
        return [sys.executable, str(file)]
    return [str(file)]


if __name__ == "__main__":
    main()
