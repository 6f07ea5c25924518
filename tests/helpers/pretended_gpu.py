"""An Apple GPU that MLX says it has, on a machine without one.

MLX computes on its CPU, and runs custom kernels on the emulator. A product of one state with
quantized rows is MLX's own Metal kernel on the emulator, too: so single states have a GPU's bits,
and several states others. What MLX's CPU still computes is attention, norms and products of floats.

``python -m pretended_gpu M4 MODULE …`` runs a module's ``main`` so.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx_lm  # noqa: F401 - before mlx_flashhead, so that `mlx_flashhead.run` patches it
from metal_emulator import Emulator

from mlx_flashhead.head import row_products
from mlx_flashhead.head.dense_kernels import QUAD_WIDTHS
from mlx_flashhead.head.matrix import Matrix
from mlx_kernels import mlx_logits

GIB = 1 << 30
# Modules of mlx-lm that make their kernels when they are imported, where there is Metal.
KERNEL_MODULES = ("mlx_lm.models.gated_delta", "mlx_lm.models.ssm")
# States that an M1 or M2 multiplies one by one, by the kernel for a single state.
ONE_BY_ONE = 5


class Chip(NamedTuple):
    """What MLX says of a GPU."""

    device_name: str
    architecture: str

    @property
    def generation(self) -> int:
        """13 for an M1, one more for each later one."""
        return int(self.architecture.removeprefix("applegpu_g")[:2])

    def info(self) -> dict[str, str | int]:
        """As ``mx.device_info`` returns it."""
        return {
            **self._asdict(),
            "memory_size": 16 * GIB,
            "max_recommended_working_set_size": 12 * GIB,
            "max_buffer_length": 9 * GIB,
            "resource_limit": 499_000,
        }


CHIPS = {
    "M1": Chip("Apple M1", "applegpu_g13g"),
    "M4": Chip("Apple M4", "applegpu_g16g"),
    "M5": Chip("Apple M5", "applegpu_g17g"),
}


@contextmanager
def pretended_gpu(chip: str = "M4", *, metal: bool = True) -> Iterator[Emulator | None]:
    """A block in which MLX computes on a GPU, by its own account.

    On a machine with Metal nothing is pretended: its own GPU computes.

    Args:
        chip: A name in ``CHIPS``.
        metal: Whether the GPU has Metal. Without, it is one of another make.

    Yields:
        The emulator, if it runs kernels.
    """
    if mx.metal.is_available():
        yield None
        return
    replaced = _replaced_functions(CHIPS[chip])
    # These are imported before there is Metal.
    modules = [importlib.import_module(name) for name in KERNEL_MODULES]
    emulator = None
    with ExitStack() as stack:
        if metal:
            emulator = stack.enter_context(Emulator(check=False).installed())
            products = _Products(CHIPS[chip])
            replaced["quantized_matmul"] = products.quantized_matmul
            replaced["gather_qmm"] = products.gather_qmm
            stack.enter_context(mock.patch.object(mx.metal, "device_info", replaced["device_info"]))
            for module in modules:
                for name, kernel in _kernels_of(module).items():
                    stack.enter_context(mock.patch.object(module, name, kernel))
        for name, function in replaced.items():
            # Versions of MLX differ.
            if hasattr(mx, name):
                stack.enter_context(mock.patch.object(mx, name, function))
        # What was tried here holds nowhere else.
        stack.enter_context(mock.patch.dict(row_products._ways, clear=True))
        stack.enter_context(_without_compile())
        yield emulator


def _replaced_functions(chip: Chip) -> dict[str, Callable[..., Any]]:
    """MLX's functions that know devices, by name: they name the GPU, and take the CPU."""
    cpu = mx.Device(mx.cpu)
    gpu = mx.Device(mx.gpu)
    original = {
        name: getattr(mx, name, None)
        for name in ("default_stream", "new_stream", "new_thread_local_stream", "stream")
    }

    def computing(target: Any = None) -> Any:
        """What computes in the place of a device or stream."""
        if target is None or target in (mx.gpu, mx.cpu, gpu):
            return cpu
        return target

    def with_cpu(name: str) -> Callable[..., Any]:
        return lambda target=None: original[name](computing(target))

    real_info = mx.device_info
    real_gather = mx.gather_mm

    def device_info(device: Any = None) -> dict[str, Any]:
        if device is not None and device == cpu:
            return real_info(cpu)
        return chip.info()

    def gather_mm(a: mx.array, b: mx.array, *arguments: Any, **options: Any) -> mx.array:
        """MLX's CPU gathers no 16-bit products."""
        floats = real_gather(a.astype(mx.float32), b.astype(mx.float32), *arguments, **options)
        return floats.astype(a.dtype)

    return {
        "default_device": lambda: gpu,
        "set_default_device": lambda device: None,
        "device_info": device_info,
        "gather_mm": gather_mm,
        **{name: with_cpu(name) for name in original},
    }


def _kernels_of(module: ModuleType) -> dict[str, Any]:
    """What a module would hold, had it been imported now, and does not: its kernels."""
    spec = importlib.util.find_spec(module.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    lacking = [name for name, value in vars(module).items() if value is None]
    return {name: getattr(fresh, name) for name in lacking if getattr(fresh, name) is not None}


class _Products:
    """Products with quantized rows: a single state's by MLX's Metal kernel, on the emulator."""

    def __init__(self, chip: Chip):
        self._quantized_matmul = mx.quantized_matmul
        self._gather_qmm = mx.gather_qmm
        if chip.generation < 15:
            self._one_by_one = ONE_BY_ONE
        else:
            self._one_by_one = 1

    def quantized_matmul(
        self,
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        **options: Any,
    ) -> mx.array:
        """As ``mx.quantized_matmul``."""
        n_states = x.size // x.shape[-1]
        if not transpose or w.ndim > 2 or n_states > self._one_by_one or x.shape[-1] in QUAD_WIDTHS:
            return self._quantized_matmul(
                x, w, scales, biases, transpose, group_size, bits, mode, **options
            )
        # MLX computes in one dtype.
        if biases is not None:
            dtype = reduce(mx.result_type, (x, scales, biases))
            x, scales, biases = (array.astype(dtype) for array in (x, scales, biases))
        rows = _rows(w, scales, biases, group_size, bits, mode)
        states = x.reshape(-1, x.shape[-1])
        products = [mlx_logits(rows, states[i : i + 1]) for i in range(n_states)]
        return mx.concatenate(products).reshape(*x.shape[:-1], -1)

    def gather_qmm(
        self,
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        lhs_indices: mx.array | None = None,
        rhs_indices: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        **options: Any,
    ) -> mx.array:
        """As ``mx.gather_qmm``."""
        if lhs_indices is None or rhs_indices is None or not transpose or x.shape[-2] > 1:
            arrays = (x, w, scales, biases, lhs_indices, rhs_indices, transpose)
            return self._gather_qmm(*arrays, group_size, bits, mode, **options)
        states = x.reshape(-1, x.shape[-1])
        pairs = zip(lhs_indices.flatten().tolist(), rhs_indices.flatten().tolist(), strict=True)
        form = {"group_size": group_size, "bits": bits, "mode": mode}
        products = []
        for i, j in pairs:
            biases_of_j = None
            if biases is not None:
                biases_of_j = biases[j]
            state = states[i : i + 1]
            products.append(self.quantized_matmul(state, w[j], scales[j], biases_of_j, **form))
        return mx.concatenate(products).reshape(*lhs_indices.shape, 1, -1)


def _rows(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int | None,
    bits: int | None,
    mode: str,
) -> Matrix:
    """Rows as MLX's functions get them; they may leave the form to the mode."""
    if group_size is None:
        group_size = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}.get(mode, 64)
    if bits is None:
        bits = {"mxfp8": 8}.get(mode, 4)
    return Matrix(weight, scales, biases, None, group_size, bits, mode)


@contextmanager
def _without_compile() -> Iterator[None]:
    """A block in which `mx.compile` calls the function through: it takes no emulated kernel."""
    already = "MLX_DISABLE_COMPILE" in os.environ
    mx.disable_compile()
    try:
        yield
    finally:
        if not already:
            mx.enable_compile()


def main() -> None:
    """Runs a module's ``main`` with a pretended GPU: its chip, the module, and its arguments."""
    chip, module = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    with pretended_gpu(chip):
        importlib.import_module(module).main()


if __name__ == "__main__":
    main()
