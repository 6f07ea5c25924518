"""``mlx_flashhead COMMAND``, also as ``python -m mlx_flashhead COMMAND``."""

import importlib
import sys

from .common.arguments import Parser
from .version import __version__

COMMANDS = {
    "generate": "generate text",
    "chat": "chat with a model at the terminal",
    "server": "serve models to browsers and over the OpenAI API",
    "run": "run another program with FlashHead under its mlx-lm",
    "cache": "list the FlashHeads that were built here, and remove some",
    "convert": "put a model and its FlashHead into one folder, also with other bits",
    "upload": "publish such a folder on the Hugging Face Hub",
    "export": "write the head's kernels and arrays for an app on an iPad or a Mac",
    "evaluate": "measure how close unverified choices come to the normal head's",
    "benchmark": "measure speed: of a head or a model",
}


def main() -> None:
    """Runs the command named by the first argument."""
    name = "--help"
    if len(sys.argv) > 1:
        name = sys.argv[1]
    if name in COMMANDS:
        # The command's own help begins with mlx_flashhead.COMMAND, which is a program, too.
        sys.argv.pop(1)
        importlib.import_module(f"mlx_flashhead.{name}").main()
    elif name in ("-h", "--help"):
        print("usage: mlx_flashhead COMMAND …\n")
        for command, what in COMMANDS.items():
            print(f"  {command:10} {what}")
        print("\nmlx_flashhead COMMAND --help explains a command.")
    elif name == "--version":
        print(__version__)
    else:
        Parser().error(f"there is no command {name}: choose one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
