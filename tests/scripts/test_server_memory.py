"""The script that measures a server's memory sees the caches that the server keeps."""

import re
import subprocess
import sys

import pytest

import server_memory
from model_folders import write_model


@pytest.mark.parametrize("n_kept", [0, 10])
def test_kept_prompts_are_arrays(tmp_path, n_kept):
    model = write_model(tmp_path / "model")
    words = [sys.executable, server_memory.__file__, str(model), "--tokens", "400", "--prompts"]
    words += ["4", "--flags", f"--dense --prompt-cache-size {n_kept}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [re.findall(r"([\d.]+) MB", line) for line in done.stdout.splitlines()]
    arrays = [float(row[1]) for row in rows if row]
    assert len(arrays) == 3
    assert (arrays[-1] > arrays[0] + 0.5) == (n_kept > 0)
