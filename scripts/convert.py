"""A shell over `mlx_flashhead/convert.py`, which works uninstalled too."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The checkout in place of scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mlx_flashhead.convert import main

    main()
