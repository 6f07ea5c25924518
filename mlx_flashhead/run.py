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
OPTIONAL = ("--fine-head", "--mtp")  # flags that may have a value
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
    # these without a value would take the program for their source
    args = parser.parse_args([f"{word}=" if word in OPTIONAL else word for word in words])
    check_draft_flags(parser, args)
    if args.program and args.program.split(".")[0] in LIBRARIES and not Path(args.program).exists():
        args.module = args.program
        args.program = None
    if not (args.hook or args.module or args.program):
        parser.error("a program is needed, such as mlx_lm.server or -m MODULE")
    program = _module(parser, args.module) if args.module else []
    program = _file(parser, args.program) if args.program else program
    from .loading.head_options import REFUSE, HeadOptions

    options = HeadOptions.from_flags(args)
    if args.no_build:
        options = replace(options, missing=REFUSE)
    if args.hook:
        for name, value in options.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        return
    if options.flash_head is not None:  # a mistake is better said here
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
        if words[i] == "-m" or not words[i].startswith("-"):
            return words[: i + 1 + (words[i] == "-m")]
        i += 2 if words[i] in with_value else 1
    return words


def _module(parser: Parser, name: str) -> list[str]:
    """The command that runs a module: as ``python -m`` does, or by its ``main``."""
    sys.path[0] = os.getcwd()  # as python -m does
    package, *parts = name.split(".")
    spec = find_spec(package) if package else None
    for part in parts:  # none of its packages is imported
        inside = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(part, inside) if inside is not None else None
    inside = spec.submodule_search_locations if spec is not None else None
    if spec is None or (inside is not None and PathFinder.find_spec("__main__", inside) is None):
        remedy = _installed_by("" if package and find_spec(package) else package)
        parser.error(f"there is no module {name} that can be run: {remedy}")
    if package == "mlx_lm" and parts:  # -m would make a second module, with loops of its own
        code = f"import sys; from {name} import main; sys.argv[0] = {name!r}; main()"
        return [sys.executable, "-c", code]
    return [sys.executable, "-m", name]


def _installed_by(name: str) -> str:
    """What to do where a program or a package is not installed."""
    return f"pip install {PACKAGES[name]}" if name in PACKAGES else "check the name"


def _file(parser: Parser, name: str) -> list[str]:
    """The command that runs a path, or a name beside this Python, or one on PATH."""
    file = Path(name).expanduser()
    installed = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not file.is_file() and installed is None:
        parser.error(f"there is no file and no program {name}: {_installed_by(name)}")
    file = file.resolve() if file.is_file() else Path(installed or "")
    with file.open("rb") as opened:
        by_env = b"env python" in opened.readline(500)
    return [sys.executable, str(file)] if by_env or file.suffix == ".py" else [str(file)]


if __name__ == "__main__":
    main()
