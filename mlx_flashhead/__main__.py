"""``python -m mlx_flashhead COMMAND``."""

import importlib
import sys

COMMANDS = {
    "convert": "turn a model into a FlashHead checkpoint",
    "upload": "publish a FlashHead checkpoint on the Hugging Face Hub",
    "generate": "generate text",
    "chat": "talk with a model at the terminal",
    "server": "serve over the OpenAI API",
    "export": "write the head as functions for an app on an iPad or a Mac",
    "evaluate": "measure how close FlashHead comes to the dense head",
    "benchmark": "measure speed, or estimate it for an Apple chip",
}


def main() -> None:
    """Runs the command named by the first argument."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked_for_help = sys.argv[1:2] in (["-h"], ["--help"])
        lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
        usage = "\n".join(["usage: python -m mlx_flashhead COMMAND …", "", *lines])
        print(usage, file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    command = sys.argv.pop(1)
    importlib.import_module(f"mlx_flashhead.{command}").main()


if __name__ == "__main__":
    main()
