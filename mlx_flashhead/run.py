"""Runs another program, unchanged, with a FlashHead under its load of mlx-lm or mlx-vlm."""

import importlib.util
import os
import runpy
import shlex
import shutil
import sys
import warnings
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from .common.arguments import Parser
from .common.command import command
from .common.flags import add_always_option, add_head_options

LIBRARIES = ("mlx_lm", "mlx_vlm")


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.run",
        description="Run another program with a FlashHead under its mlx_lm.load or mlx_vlm.load. "
        "Programs that it starts have it, too.",
        usage="mlx_flashhead.run [options] (-m MODULE | PROGRAM) [its arguments]",
    )
    add_head_options(parser)
    add_always_option(parser)
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="Use FlashHead's own choices, in loops that cannot be verified, too.",
    )
    parser.add_argument(
        "--hook",
        action="store_true",
        help="Print the variables with which any Python process has a FlashHead, such as a "
        "service's or an app's.",
    )
    parser.add_argument("-m", dest="module", metavar="MODULE", help="A module, as python -m does.")
    parser.add_argument(
        "program",
        nargs="?",
        metavar="PROGRAM",
        help="A Python file, an installed program, or a program of mlx-lm such as mlx_lm.server.",
    )
    return parser


def main() -> None:
    """Entry point of ``mlx_flashhead.run``."""
    args, rest = _prepare()
    if args.module is not None:
        _run_module(args.module, rest)
    elif args.program is not None:
        _run_program(args.program, rest)


@command
def _prepare() -> tuple[Namespace, list[str]]:
    """Reads the arguments and patches the loads. What comes after is the program's own."""
    parser = make_parser()
    words = _split(parser, sys.argv[1:])
    rest = sys.argv[1 + len(words) :]
    # --fine-head without a value would take the program for its source
    args = parser.parse_args(["--fine-head=" if word == "--fine-head" else word for word in words])
    if args.program and args.program.split(".")[0] in LIBRARIES and not Path(args.program).exists():
        args.module, args.program = args.program, None
    if not (args.hook or args.module or args.program):
        parser.error("a program is needed, such as mlx_lm.server or -m MODULE")
    if args.program:
        args.program = _find(parser, args.program)
    from .loading.patch import environment, patch_load
    from .loading.sources import HeadOptions

    options = HeadOptions.from_flags(args)
    variables = environment(options)
    if args.hook:
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")
        return Namespace(module=None, program=None), rest
    patch_load(options)
    os.environ.update(variables)
    if args.module:
        sys.path[0] = os.getcwd()  # as python -m does
        if not _can_run(args.module):
            parser.error(f"there is no module {args.module} that can be run: check the name")
    return args, rest


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


def _find(parser: Parser, name: str) -> Path:
    """The file of a program: a path, or a name beside this Python, or one on PATH."""
    file = Path(name).expanduser()
    if file.is_file():
        return file.resolve()
    installed = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if installed is None:
        parser.error(f"there is no file and no program {name}: check the name")
    return Path(installed)


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


def _run_module(name: str, arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    with warnings.catch_warnings():
        # mlx_lm has imported some of its programs
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        # mlx_lm.evaluate has a main, and runs nothing as a module
        imported: Any = import_module(name) if name.startswith("mlx_lm.") else None
        if hasattr(imported, "main"):
            sys.argv[0] = name
            imported.main()  # runpy would make a second module, with loops of its own
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_program(file: Path, arguments: list[str]) -> None:
    """Runs a program in this Python, if it is this Python's. Any other one starts as a process of
    its own, whose Python reads the variables."""
    here = file.suffix == ".py"
    if not here:
        with file.open("rb") as opened:
            first = opened.readline(500).decode(errors="replace").split()
        if first and first[0].startswith("#!"):
            interpreter = Path(first[0].removeprefix("#!"))
            own = (Path(sys.executable).parent, Path(sys.prefix) / "bin")
            here = interpreter.name.startswith("python") and interpreter.parent in own
            by_env = interpreter.name == "env" and len(first) > 1
            here = here or (by_env and first[1].startswith("python"))
    if not here:
        os.execv(file, [str(file), *arguments])
    sys.argv[:] = [str(file), *arguments]
    sys.path[0] = str(file.parent)
    runpy.run_path(str(file), run_name="__main__")


if __name__ == "__main__":
    main()
