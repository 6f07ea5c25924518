"""The model that is suggested where none is given, by this machine's memory.

README.md shows the same table.
"""

import sys
from typing import NamedTuple

from .machine import memory_bytes


class Suggestion(NamedTuple):
    """A model for machines with so much memory or more.

    Attributes:
        memory_gb: The machine's memory.
        model: A repository.
        size_gb: The size of its files.
    """

    memory_gb: int
    model: str
    size_gb: float


SUGGESTIONS = (
    Suggestion(64, "mlx-community/Qwen3.6-35B-A3B-8bit", 37.7),
    Suggestion(32, "mlx-community/Qwen3.8-27B-4bit", 16.1),
    Suggestion(16, "mlx-community/Qwen3.5-9B-MLX-4bit", 6.0),
    Suggestion(8, "mlx-community/gemma-3-4b-it-qat-4bit", 3.0),
    Suggestion(0, "mlx-community/gemma-3-1b-it-4bit", 0.7),
)


def suggested() -> Suggestion:
    """The largest of the suggested models for this machine's memory."""
    has_gb = round(memory_bytes() / 2**30)
    return next(each for each in SUGGESTIONS if each.memory_gb <= has_gb)


def model_is_needed() -> str:
    """Says that --model is missing, and which one would do here."""
    found = suggested()
    return (
        "--model is needed: give a folder or a repository of a model, on this machine for example "
        f"{found.model} ({found.size_gb:g} GB)"
    )


def asked_for_model() -> str:
    """Asks at a terminal for a model, and suggests one.

    Returns:
        What is typed, or the suggested repository; empty where nobody can be asked.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return ""
    found = suggested()
    memory_gb = round(memory_bytes() / 2**30)
    print(
        f"No --model is given. For {memory_gb} GB of memory: {found.model} ({found.size_gb:g} GB)."
    )
    try:
        typed = input("Return takes it, or type another folder or repository: ").strip()
    except EOFError:
        return ""
    return typed or found.model
