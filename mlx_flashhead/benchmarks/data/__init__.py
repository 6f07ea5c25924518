"""Tables of chips, of models and of public speeds.

``chips.csv``: the largest configuration of each; GB/s as Apple specifies them
(support.apple.com/specs), TFLOPS in 32 bits from cores, 128 lanes and the clock that others
measured, without the matrix units of an M5. ``models.csv``: sizes from the models' config.json,
kernels of a layer's norms, and the clusters that a proposal scores, 0 where no index was built
here. ``speeds.csv``: tokens per second of dense models on Macs as others published them, for one
sequence and without the prompt's time, MLX 0.23 and later, ordinary decoders up to 14 billion
weights. ``context`` are the tokens in the cache where the source states 500 or more. Read on
2026-11-27.
"""

from importlib import resources

import numpy as np


def read(name: str) -> list[dict]:
    """The rows of a table, with numbers as such."""
    with (resources.files(__package__) / f"{name}.csv").open(encoding="utf-8") as file:
        table = np.genfromtxt(
            file, delimiter=",", names=True, dtype=None, comments="\0", encoding="utf-8"
        )
    names = table.dtype.names or ()
    return [dict(zip(names, row, strict=True)) for row in table.tolist()]
