"""What the tests share: the real model's folder, and quiet libraries."""

import os
from pathlib import Path

import pytest

# Before anything imports transformers or tokenizers: notices would hide a test's own output, and
# tokenizers warns whenever a test starts a process after it has used its threads.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fetch_smollm2 import fetch_smollm2


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, built once per machine.

    It is kept in ``$MLX_FLASHHEAD_TEST_CACHE``, by default ``~/.cache/mlx_flashhead``.
    """
    cache = os.environ.get("MLX_FLASHHEAD_TEST_CACHE") or Path.home() / ".cache" / "mlx_flashhead"
    try:
        return fetch_smollm2(Path(cache) / "smollm2")
    except (ValueError, OSError) as error:
        pytest.fail(f"{error} (Tests without the real model: -m 'not real'.)", pytrace=False)
