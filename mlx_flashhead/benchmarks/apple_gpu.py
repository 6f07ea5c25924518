"""What costs time on Apple's chips: constants with their sources, and public speeds of Macs.

This project has measured none of them.
"""

from dataclasses import dataclass

from . import data

# The first four are fitted to data/speeds.csv: scripts/figures/fit_macs.py prints their errors.
BANDWIDTH_SHARE = 0.882
ULTRA_SHARE = 0.735
LAUNCH_US = 3.32
OLD_LAUNCH_US = 7.41
GATHER_SHARE = 387 / 514
MATRIX_SHARE = 0.78
GROUP_GB_S = 12
BARRIER_US = 1
CONSTANTS = {  # name: value, source
    "bandwidth": (BANDWIDTH_SHARE, "of Apple's figure: fitted to public speeds"),
    "of an Ultra": (ULTRA_SHARE, "the same"),
    "launch": (LAUNCH_US, "µs per dependent kernel: fitted to public speeds"),
    "on M1, M2": (OLD_LAUNCH_US, "the same"),
    "g": (GATHER_SHARE, "of a plain read, gather_qmm: M3 Ultra, mlx issue 4509"),
    "arithmetic": (MATRIX_SHARE, "of the peak, 32 states: an estimate"),
    "threadgroup": (GROUP_GB_S, "GB/s of one, a core's part of an M4 Max: an estimate"),
    "barrier": (BARRIER_US, "µs: an estimate"),
}


@dataclass(frozen=True)
class Chip:
    """A chip in its largest configuration: its peaks, and what is reached of them."""

    name: str
    peak_gb_s: float
    peak_tflops: float

    @property
    def ultra(self) -> bool:
        """Whether it is two chips in one."""
        return self.name.endswith("ultra")

    @property
    def old(self) -> bool:
        """Whether it is older than the M3."""
        return self.name[:2] in ("m1", "m2")

    @property
    def gb_s(self) -> float:
        """What a product with a vector reads."""
        return self.peak_gb_s * (ULTRA_SHARE if self.ultra else BANDWIDTH_SHARE)

    @property
    def launch_us(self) -> float:
        """Of a dependent kernel."""
        return OLD_LAUNCH_US if self.old else LAUNCH_US

    @property
    def tflops(self) -> float:
        """Of a product with 32 states."""
        return self.peak_tflops * MATRIX_SHARE


CHIPS = {
    row["chip"]: Chip(row["chip"], float(row["gb_s"]), float(row["tflops"]))
    for row in data.read("chips")
}


def find_chip(name: str) -> Chip:
    """The chip of a name such as "m4-pro".

    Raises:
        ValueError: If the chip is unknown.
    """
    if name not in CHIPS:
        raise ValueError(f"Unknown chip {name!r}: choose one of {', '.join(CHIPS)}.")
    return CHIPS[name]


@dataclass(frozen=True)
class PublicSpeed:
    """A row of data/speeds.csv. ``model`` is a key of SHAPES, ``source`` the page's address."""

    chip: Chip
    model: str
    bits: int
    group_size: int
    context: int
    tokens_per_second: float
    program: str
    date: str
    source: str


def public_speeds() -> list[PublicSpeed]:
    """All of them."""
    return [
        PublicSpeed(
            chip=CHIPS[row["chip"]],
            model=row["model"],
            bits=int(row["bits"]),
            group_size=int(row["group_size"]),
            context=int(row["context"]),
            tokens_per_second=float(row["tokens_per_second"]),
            program=row["program"],
            date=row["date"],
            source=row["source"],
        )
        for row in data.read("speeds")
    ]
