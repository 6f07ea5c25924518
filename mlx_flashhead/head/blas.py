"""The BLAS of MLX's CPU products: the wheel for Linux brings the slow reference BLAS."""

import ctypes
import sys

ACCELERATE, REFERENCE = "Accelerate", "the reference BLAS of the mlx wheel"


def blas_name() -> str:
    """Its name, with its number of threads if it is known."""
    if sys.platform == "darwin":
        return ACCELERATE
    process = ctypes.CDLL(None)  # finds preloaded libraries
    if not hasattr(process, "openblas_get_config"):
        return REFERENCE
    process.openblas_get_config.restype = ctypes.c_char_p
    threads = process.openblas_get_num_threads()
    name = " ".join(process.openblas_get_config().decode().split()[:2])
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"
