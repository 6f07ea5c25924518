"""Stands in for ``mx.fast.metal_kernel`` where there is no Metal."""

import contextlib
from functools import partial

import mlx.core as mx
import numpy as np

from .build import compile_kernel
from .run import INPUT, ORDERS, OUTPUT, Buffer, launch
from .signature import ATTRIBUTES, metal_kernel, signature_of

MAX_THREADS_PER_THREADGROUP = 1024


def bits_of(array: mx.array) -> np.ndarray:
    """The array as numpy, without a copy; bfloat16, which numpy lacks, as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    mx.eval(array)
    return np.asarray(array)


def from_bytes(data: np.ndarray, shape, dtype: mx.Dtype) -> mx.array:
    """An array of a dtype and shape from its bytes, uint8."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.size]
    return mx.array(data.view(unsigned)).view(dtype).reshape(tuple(shape))


class Emulator:
    """Runs custom Metal kernels on the CPU, with checks and counts.

    Args:
        order: Order of threads and threadgroups: ``forward``, ``reverse`` or ``shuffle``. A correct
            kernel gives the same outputs in each.
        seed: Of the shuffled order.
        check: Whether to check and count accesses. Without, kernels run several times faster, and
            only compile errors, divergent barriers and too much threadgroup memory are found.
        max_threads: By a kernel's name, the threads its pipeline allows in a threadgroup: on a
            device fewer than 1,024 where a kernel takes many registers.

    Attributes:
        dispatches: One :class:`Dispatch` for each launch so far.
        built: Texts of the kernels that were compiled, each once: MLX keeps one library for each.

    Raises:
        ValueError: If the order is unknown.
    """

    def __init__(self, order="forward", seed=0, check=True, max_threads=None):
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}: it must be one of {', '.join(ORDERS)}.")
        self.order = order
        self.seed = seed
        self.check = check
        self.max_threads = max_threads or {}
        self.dispatches = []
        self.built = set()

    def metal_kernel(self, **options):
        """Takes and refuses what ``mx.fast.metal_kernel`` does; the result is called likewise."""
        metal_kernel(**options)
        return partial(self._run, options)

    @contextlib.contextmanager
    def installed(self):
        """Puts the emulator in MLX's place, so that code asking for Metal finds it."""
        saved = mx.fast.metal_kernel, mx.metal.is_available
        mx.fast.metal_kernel, mx.metal.is_available = self.metal_kernel, lambda: True
        try:
            yield self
        finally:
            mx.fast.metal_kernel, mx.metal.is_available = saved

    def _run(
        self,
        options,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
    ):
        """Runs a kernel at once (MLX would wait until an output is needed).

        Args:
            options: What the kernel was made with.
            inputs: Arrays or Python scalars.
            output_shapes, output_dtypes: Of each output.
            grid, threadgroup: Three numbers of threads each.
            template: Pairs of a name and a dtype, int or bool.
            init_value: What outputs hold before the kernel runs, or None.

        Returns:
            One array for each output.

        Raises:
            ValueError: As MLX does.
            KernelFault: If the kernel is refused or misbehaves.
        """
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        mx.eval(arrays)
        call = {"grid": grid, "threadgroup": threadgroup, "template": template or []}
        outputs = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        signature = signature_of(options, arrays, call | outputs)
        name, output_names = options["name"], options["output_names"]
        grid, threadgroup = self.dispatch_size(name, grid, threadgroup)
        data = {key: bits_of(x) for key, x in zip(options["input_names"], arrays, strict=True)}
        if options.get("ensure_row_contiguous", True):
            data = {key: np.ascontiguousarray(x).reshape(x.shape) for key, x in data.items()}
        forms = dict(zip(output_names, zip(output_shapes, output_dtypes, strict=True), strict=True))
        buffers = []
        for parameter in signature.parameters:
            if parameter in forms:
                buffers.append(output_buffer(parameter, *forms[parameter], init_value))
            elif parameter not in ATTRIBUTES:
                buffers.append(input_buffer(parameter, data))
        self.built.add(signature.text)
        library = compile_kernel(signature.text, signature.entry(), signature.name, self.check)
        self.dispatches.append(
            launch(name, library, buffers, grid, threadgroup, self.order, self.seed, self.check)
        )
        return [
            from_bytes(buffer.data, *forms[buffer.name])
            for buffer in buffers[len(buffers) - len(forms) :]
        ]

    def dispatch_size(self, name, grid, threadgroup):
        """Grid and threadgroup as MLX dispatches them: no threadgroup is larger than the grid.

        Raises:
            ValueError: If a size is not positive or the threadgroup too large.
        """
        grid, threadgroup = tuple(map(int, grid)), tuple(map(int, threadgroup))
        if len(grid) != 3 or len(threadgroup) != 3 or min(grid + threadgroup) < 1:
            raise ValueError(
                f"[metal_kernel] grid {grid} and threadgroup {threadgroup} must be three positive "
                "numbers of threads each."
            )
        n_threads = int(np.prod(threadgroup))
        allowed = self.max_threads.get(name, MAX_THREADS_PER_THREADGROUP)
        if n_threads > allowed:
            raise ValueError(
                f"Thread group size ({n_threads}) is greater than  the maximum allowed threads per "
                f"threadgroup ({allowed})."
            )
        return grid, tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))


def output_buffer(name: str, shape, dtype: mx.Dtype, init_value) -> Buffer:
    """Memory for an output: ``init_value``, or what nobody has written yet."""
    buffer = Buffer(
        name, OUTPUT, dtype.size, int(np.prod(shape)) * dtype.size, init_value is not None
    )
    buffer.data[:] = 0xFF  # NaN in every floating dtype
    if init_value is not None:
        value = bits_of(mx.array(init_value).astype(dtype)).tobytes()
        buffer.data.reshape(-1, dtype.size)[:] = np.frombuffer(value, np.uint8)
    return buffer


def input_buffer(name: str, data: dict[str, np.ndarray]) -> Buffer:
    """Memory for an input, or for the shape, strides or ndim of one."""
    values = input_values(name, data)
    buffer = Buffer(name, INPUT, values.itemsize, values.nbytes, True)
    buffer.data[:] = values.reshape(-1).view(np.uint8)
    return buffer


def input_values(name: str, data: dict[str, np.ndarray]) -> np.ndarray:
    """What one parameter of an input holds: its memory, shape, strides in elements, or ndim."""
    if name not in data:
        of, _, role = name.rpartition("_")
        x = data[of]
        if role == "strides":
            return np.array(x.strides, np.int64) // x.itemsize
        return np.array(x.shape if role == "shape" else [x.ndim], np.int32)
    x = data[name]
    if x.flags.c_contiguous or x.size == 0:
        return x
    # A view with strides: all elements from the first to the last that it can reach.
    if min(x.strides) < 0:
        raise ValueError(
            f"[metal_kernel] Input '{name}' has negative strides, which the emulator "
            "does not take: use ensure_row_contiguous=True."
        )
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) // x.itemsize
    return np.lib.stride_tricks.as_strided(x, (reach,), (x.itemsize,))
