"""The versions of mlx-lm and mlx that this project takes, and what an import of it brings along."""

import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_flashhead.models.compat import warn_of_later

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["mlx", "mlx-lm"])
def test_a_later_version_warns_and_is_not_forbidden(package):
    with pytest.warns(UserWarning, match=f"{package} up to 0.32, and 0.33.1 is installed"):
        warn_of_later(package, "0.33.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_later(package, "0.32.9")
        warn_of_later(package, version(package))


@pytest.mark.newest
def test_a_program_that_loads_imports_no_other_program():
    code = "import mlx_flashhead, sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    modules = set(output.stdout.split())
    assert "mlx_lm" in modules
    assert not modules & {"mlx_lm.chat", "mlx_lm.server", "mlx_lm.evaluate", "rich"}
