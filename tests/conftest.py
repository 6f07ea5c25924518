"""What the tests share: the real model's folder, and quiet libraries."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

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
    named = os.environ.get("MLX_FLASHHEAD_TEST_CACHE")
    cache = Path(named) if named else Path.home() / ".cache" / "mlx_flashhead"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "smollm2.lock"):  # the tests run in several processes
            return fetch_smollm2(cache / "smollm2")
    except (ValueError, OSError) as error:
        pytest.fail(f"{error} (Tests without the real model: -m 'not real'.)", pytrace=False)
