"""Runs programs under ``mlx_flashhead.run``, as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
DENSE = "Without FlashHead: "


def command(*words) -> tuple[list[str], dict[str, str]]:
    """The command line of ``mlx_flashhead.run``, and its environment."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    return [sys.executable, "-m", "mlx_flashhead.run", *map(str, words)], environment


def run(place: Path, *words, typed: str = "") -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``mlx_flashhead.run`` in a folder."""
    words, environment = command(*words)
    result = subprocess.run(
        words, cwd=place, env=environment, input=typed, capture_output=True, text=True
    )
    return result.returncode, result.stdout, result.stderr


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
