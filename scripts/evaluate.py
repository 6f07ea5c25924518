"""A shell over `mlx_flashhead/evaluate.py`, which works uninstalled too."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout in place of scripts/
    from mlx_flashhead.evaluate import main

    main()
