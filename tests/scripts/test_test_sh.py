"""scripts/test.sh: the tests that it names."""

import re
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_the_files_that_it_names_are_there():
    script = (CHECKOUT / "scripts" / "test.sh").read_text()
    code = " ".join(line for line in script.splitlines() if not line.startswith("#"))
    named = " ".join(re.findall(r"tests/\S+", code))
    assert named
    expanded = subprocess.run(["bash", "-c", f"echo {named}"], capture_output=True, text=True)
    missing = [name for name in expanded.stdout.split() if not (CHECKOUT / name).exists()]
    assert not missing
