"""Fits the constants of the estimate to public speeds of Macs, and shows the estimate's errors.

    python scripts/figures/fit_macs.py

Least squares of relative errors over mlx_flashhead/benchmarks/data/speeds.csv, with four
constants: the share of Apple's bandwidth that is reached, of an Ultra too, and the time of a
dependent kernel, on M1 and M2 too. Each speed is estimated from the others (leave one out), and
from those of other chips. The constants belong into mlx_flashhead/benchmarks/roofline.py.
"""

import numpy as np

from mlx_flashhead.benchmarks.roofline import CHIPS, SPEEDS, dense_step
from mlx_flashhead.benchmarks.shapes import SHAPES
from mlx_flashhead.common.tables import new_table, percent, show

CONSTANTS = ("BANDWIDTH_SHARE", "ULTRA_SHARE", "LAUNCH_US", "OLD_LAUNCH_US")


def parts(speed: dict) -> list[float]:
    """Parts of the step's time that the constants are factors of, relative to the whole."""
    read, kernels = dense_step(speed)
    chip = CHIPS[speed["chip"]]
    us, ultra, old = read / chip.peak_gb_s / 1e3, chip.ultra, chip.old
    row = us * (not ultra), us * ultra, kernels * (not old), kernels * old
    return [part * speed["tokens_per_second"] / 1e6 for part in row]


def fit(rows: np.ndarray) -> np.ndarray:
    """The factors (4,) with the least squares of relative errors."""
    return np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]


def fitted_constants(speeds: list[dict]) -> dict[str, float]:
    """The constants by name."""
    factors = fit(np.array([parts(speed) for speed in speeds]))
    return dict(zip(CONSTANTS, [*(1 / factors[:2]), *factors[2:]], strict=True))


def errors_without(speeds: list[dict], *, whole_chip: bool = False) -> np.ndarray:
    """The relative error of each estimate that is fitted to the others, or other chips, (N,)."""
    rows = np.array([parts(speed) for speed in speeds])
    chips = np.array([speed["chip"] for speed in speeds])
    errors = np.empty(len(speeds))
    for i, row in enumerate(rows):
        left = chips != chips[i] if whole_chip else np.arange(len(rows)) != i
        errors[i] = row @ fit(rows[left]) - 1
    return errors


def main() -> None:
    """Prints the constants and the errors."""
    without_speed, without_chip = (
        errors_without(SPEEDS, whole_chip=whole_chip) for whole_chip in (False, True)
    )
    table = new_table(
        f"{len(SPEEDS)} public speeds; errors of estimates from the others",
        ("chip", "model", "bits", "tokens/s", "error", "without the chip"),
        left=2,
    )
    for speed, *errors in zip(SPEEDS, without_speed, without_chip, strict=True):
        name, bits = SHAPES[speed["model"]].name, f"{speed['bits']}"
        cells = (f"{speed['tokens_per_second']:g}", *(f"{error:+.0%}" for error in errors))
        table.add_row(speed["chip"], name, bits, *cells)
    show(table)
    for name, value in fitted_constants(SPEEDS).items():
        print(f"{name} = {value:.3g}")
    for name, errors in (("one speed", without_speed), ("a chip", without_chip)):
        sizes = np.abs(errors)
        print(
            f"Without {name}: median error {percent(float(np.median(sizes)), 1)}, nine of ten "
            f"below {percent(float(np.quantile(sizes, 0.9)), 0)}, from {errors.min():+.0%} to "
            f"{errors.max():+.0%}."
        )


if __name__ == "__main__":
    main()
