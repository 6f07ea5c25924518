"""Runs another program, unchanged, with a FlashHead under its load of mlx-lm or mlx-vlm."""

import importlib.util
import os
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from .common.arguments import Parser
from .common.command import sentence
from .common.head_flags import add_head_options
from .loading.patch import patch_load, patch_new_processes
from .loading.sources import HeadOptions


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.run",
        description="Run another program with a FlashHead under its mlx_lm.load or mlx_vlm.load. "
        "Without one, the program runs dense, with one warning.",
        usage="mlx_flashhead.run [options] (-m MODULE | PROGRAM) [its arguments]",
    )
    add_head_options(parser)
    parser.add_argument("-m", dest="module", metavar="MODULE", help="A module, as python -m does.")
    parser.add_argument(
        "program",
        nargs="?",
        metavar="PROGRAM",
        help="A Python file, or the name of an installed Python program.",
    )
    return parser


def main() -> None:
    """Entry point of ``mlx_flashhead.run``."""
    parser = make_parser()
    words = _own_part(sys.argv[1:])
    args, rest = parser.parse_args(words), sys.argv[1 + len(words) :]
    if args.module is None and args.program is None:
        parser.error("-m MODULE or a program is needed, such as -m mlx_lm.server")
    script = None if args.module is not None else _script(parser, args.program)
    try:
        options = HeadOptions.from_flags(args)
        patch_load(options)
        patch_new_processes(options)
    except (ValueError, OSError) as error:
        parser.error(sentence(error))
    if script is None:
        sys.path[0] = os.getcwd()  # as python -m does
        if not _can_run(args.module):
            parser.error(f"there is no module {args.module} that can be run: check -m")
        sys.argv[1:] = rest
        with warnings.catch_warnings():
            # mlx_lm has imported some of its programs
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
            imported: Any = sys.modules.get(args.module)
            # from here on errors are the program's own
            if args.module.startswith("mlx_lm.") and hasattr(imported, "main"):
                imported.main()  # runpy would make a second module, with loops of its own
            else:
                runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [str(script), *rest]
        sys.path[0] = str(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def _own_part(words: list[str]) -> list[str]:
    """The words up to the program's name. All later words are the program's."""
    i = 0
    while i < len(words):
        if words[i] == "-m":
            return words[: i + 2]
        if not words[i].startswith("-"):
            return words[: i + 1]
        takes_value = words[i] in ("--n-probes", "--flash-head")
        i += 2 if takes_value else 1
    return words


def _can_run(module: str) -> bool:
    """Whether ``python -m`` can run it: a module, or a package with a ``__main__``."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # a module that a package of it lacks
        return False
    return spec is not None


def _script(parser: Parser, name: str) -> Path:
    file = Path(name).expanduser()
    if file.is_file():
        return file.resolve()
    installed = shutil.which(name)
    if installed is None:
        parser.error(f"there is no file and no program {name}")
    with open(installed, "rb") as opened:
        if b"python" not in opened.readline():
            parser.error(f"{installed} is not a Python program")
    return Path(installed)


if __name__ == "__main__":
    main()
