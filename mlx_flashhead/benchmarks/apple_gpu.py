"""Public constants and measurements of Apple's chips, with their sources.

This project has measured none of them.
"""

from dataclasses import dataclass

LAUNCH_US = 2.75  # 3,200 tiny dependent kernels took 8.8 ms, boundaries of buffers included
GEMV_SHARE = 478 / 614  # of the peak, 4-bit matrix times vector
GATHER_SHARE = 387 / 514  # rate of gather_qmm with one row, relative to a plain read
SELECT_US = 15  # select and sample, each one threadgroup: by their barriers and reads, a guess
MATRIX_SHARE = 0.78  # of the peak arithmetic, a product of 32 states: 2.8 of 3.6 TFLOPS on an M2
CONSTANTS = {  # name: value, source
    "launch": (LAUNCH_US, "µs per dependent kernel: M3 Ultra, mlx issue 4521"),
    "GEMV share": (GEMV_SHARE, "of peak bandwidth: M5 Max, lablup/mlxcel pull request 358"),
    "arithmetic": (MATRIX_SHARE, "of the peak, 32 states: an estimate"),
    "select": (SELECT_US, "µs of the two kernels of one threadgroup: an estimate"),
    "g": (GATHER_SHARE, "of a plain read, gather_qmm: M3 Ultra, mlx issue 4509"),
}

# GB/s of the largest configuration, as Apple specifies them: support.apple.com/specs.
PEAK_GB_S = {
    "m1": 68,
    "m1-pro": 200,
    "m1-max": 400,
    "m1-ultra": 800,
    "m2": 100,
    "m2-pro": 200,
    "m2-max": 400,
    "m2-ultra": 800,
    "m3": 100,
    "m3-pro": 150,
    "m3-max": 400,
    "m3-ultra": 819,
    "m4": 120,
    "m4-pro": 273,
    "m4-max": 546,
    "m5": 153,
    "m5-pro": 307,
    "m5-max": 614,
}
# 32-bit TFLOPS of the largest configuration: cores, 128 lanes and the clock that others measured.
PEAK_TFLOPS = {
    "m1": 2.6,
    "m1-pro": 5.2,
    "m1-max": 10.4,
    "m1-ultra": 20.8,
    "m2": 3.6,
    "m2-pro": 6.8,
    "m2-max": 13.5,
    "m2-ultra": 27.0,
    "m3": 3.5,
    "m3-pro": 6.4,
    "m3-max": 14.1,
    "m3-ultra": 28.2,
    "m4": 4.3,
    "m4-pro": 8.6,
    "m4-max": 17.2,
    "m5": 4.3,
    "m5-pro": 8.6,
    "m5-max": 17.2,
}
# A plain read of 512 MB, for chips on which it is below that share: mlx issue 4509.
MEASURED_GB_S = {"m3-ultra": 514}


@dataclass(frozen=True)
class Measurement:
    """A public figure of mlx-lm with a model of 4 bits.

    Attributes:
        model: Its name.
        shape: Key of SHAPES.
        chip: Key of PEAK_GB_S.
        tokens_per_second: As published.
    """

    model: str
    shape: str
    chip: str
    tokens_per_second: float


def bandwidth(chip: str) -> float:
    """GB/s that a product with a vector reaches.

    Raises:
        ValueError: If the chip is unknown.
    """
    if chip not in PEAK_GB_S:
        raise ValueError(f"Unknown chip {chip!r}: choose one of {', '.join(PEAK_GB_S)}.")
    return MEASURED_GB_S.get(chip, PEAK_GB_S[chip] * GEMV_SHARE)


def arithmetic(chip: str) -> float:
    """TFLOPS that a product with 32 states reaches. An M5's matrix units are left out.

    Raises:
        ValueError: If the chip is unknown.
    """
    bandwidth(chip)
    return PEAK_TFLOPS[chip] * MATRIX_SHARE


# mlx-lm with one sequence. M5 Max: lablup/mlxcel, docs/benchmark_results/model_tests_m5max.md.
PUBLIC_MEASUREMENTS = (
    Measurement("Llama-3.2-1B", "llama-3.2-1b", "m5-max", 537),
    Measurement("Qwen3-0.6B", "qwen3-0.6b", "m5-max", 571),
    Measurement("Gemma-3-1B", "gemma-3-1b", "m5-max", 375),
    Measurement("SmolLM-135M", "smollm2", "m5-max", 724),
    Measurement("Llama-3.2-1B", "llama-3.2-1b", "m4-max", 464),
    Measurement("Qwen3-0.6B", "qwen3-0.6b", "m3-ultra", 388),
    Measurement("Gemma-3-1B", "gemma-3-1b", "m3-ultra", 258),
    Measurement("Llama-3.2-1B", "llama-3.2-1b", "m3", 78),
    Measurement("Qwen3-0.6B", "qwen3-0.6b", "m1", 110),
)
