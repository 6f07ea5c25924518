"""Stands in for ``mx.fast.metal_kernel`` where there is no Metal."""

import contextlib

import mlx.core as mx
import numpy as np

from .build import compile_kernel
from .run import INPUT, ORDERS, OUTPUT, Buffer, entry_text, launch
from .signature import template_kind, write_signature

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

    def metal_kernel(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
    ):
        """Takes and refuses what ``mx.fast.metal_kernel`` does; the result is called likewise."""
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        return Kernel(
            self,
            name,
            list(input_names),
            list(output_names),
            source,
            header,
            ensure_row_contiguous,
            atomic_outputs,
        )

    @contextlib.contextmanager
    def installed(self):
        """Puts the emulator in MLX's place, so that code asking for Metal finds it."""
        saved = mx.fast.metal_kernel, mx.metal.is_available
        mx.fast.metal_kernel, mx.metal.is_available = self.metal_kernel, lambda: True
        try:
            yield self
        finally:
            mx.fast.metal_kernel, mx.metal.is_available = saved


class Kernel:
    """What :meth:`Emulator.metal_kernel` returns."""

    def __init__(
        self,
        emulator,
        name,
        input_names,
        output_names,
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
    ):
        self.emulator = emulator
        self.name = name
        self.input_names = input_names
        self.output_names = output_names
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        stream=None,
    ):
        """Runs the kernel at once (MLX would wait until an output is needed).

        Args:
            inputs: Arrays or Python scalars.
            output_shapes, output_dtypes: Of each output.
            grid, threadgroup: Three numbers of threads each.
            template: Pairs of a name and a dtype, int or bool.
            init_value: What outputs hold before the kernel runs, or None.
            stream: Accepted if it is none of the CPU's.

        Returns:
            One array for each output.

        Raises:
            ValueError: As MLX does.
            KernelFault: If the kernel is refused or misbehaves.
        """
        for given, names, label in (
            (inputs, self.input_names, "inputs"),
            (output_shapes, self.output_names, "output_shapes"),
            (output_dtypes, self.output_names, "output_dtypes"),
        ):
            if len(given) != len(names):
                raise ValueError(
                    f"[metal_kernel] Expected `{label}` to have size {len(names)} but got size "
                    f"{len(given)}."
                )
        device = getattr(stream, "device", stream)  # of a Stream; a Device or DeviceType otherwise
        if stream is not None and getattr(device, "type", device) == mx.cpu:
            raise ValueError("[metal_kernel] Only supports the GPU.")
        template = [(key, value) for key, value in template or [] if template_kind(value)]
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        signature = self.signature(arrays, output_dtypes, template)
        grid, threadgroup = self.dispatch_size(grid, threadgroup)
        buffers = self.buffers(signature, arrays, output_shapes, output_dtypes, init_value)
        self.emulator.built.add(signature.text)
        library = compile_kernel(
            signature.text, entry_text(signature), signature.kernel_name, self.emulator.check
        )
        self.emulator.dispatches.append(
            launch(
                self.name,
                library,
                buffers,
                grid,
                threadgroup,
                self.emulator.order,
                self.emulator.seed,
                self.emulator.check,
            )
        )
        outputs = buffers[len(buffers) - len(self.output_names) :]
        return [
            from_bytes(buffer.data, shape, dtype)
            for buffer, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]

    def signature(self, arrays, output_dtypes, template):
        """The text for these arguments."""
        return write_signature(
            self.name,
            self.input_names,
            self.output_names,
            self.source,
            self.header,
            self.atomic_outputs,
            arrays,
            output_dtypes,
            template,
        )

    def dispatch_size(self, grid, threadgroup):
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
        allowed = self.emulator.max_threads.get(self.name, MAX_THREADS_PER_THREADGROUP)
        if n_threads > allowed:
            raise ValueError(
                f"Thread group size ({n_threads}) is greater than  the maximum allowed threads per "
                f"threadgroup ({allowed})."
            )
        return grid, tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))

    def buffers(self, signature, arrays, output_shapes, output_dtypes, init_value):
        """Memory for each parameter of the kernel, inputs filled in."""
        buffers = []
        data = [bits_of(array) for array in arrays]
        if self.ensure_row_contiguous:
            data = [np.ascontiguousarray(x).reshape(x.shape) for x in data]
        for parameter in signature.parameters:
            if parameter.role == "output":
                shape, dtype = output_shapes[parameter.position], output_dtypes[parameter.position]
                n_bytes = int(np.prod(shape)) * dtype.size
                initialised = init_value is not None
                buffer = Buffer(parameter.name, OUTPUT, dtype.size, n_bytes, initialised)
                buffer.data[:] = 0xFF  # NaN in every floating dtype
                if initialised:
                    value = bits_of(mx.array(init_value).astype(dtype)).tobytes()
                    buffer.data.reshape(-1, dtype.size)[:] = np.frombuffer(value, np.uint8)
            else:
                values = input_values(parameter, data[parameter.position])
                itemsize = values.itemsize
                buffer = Buffer(parameter.name, INPUT, itemsize, values.nbytes, True)
                buffer.data[:] = values.reshape(-1).view(np.uint8)
            buffers.append(buffer)
        return buffers


def input_values(parameter, x: np.ndarray) -> np.ndarray:
    """What one parameter of an input holds: its memory, shape, strides in elements, or ndim."""
    if parameter.role == "shape":
        return np.array(x.shape, np.int32)
    if parameter.role == "strides":
        return np.array(x.strides, np.int64) // x.itemsize
    if parameter.role == "ndim":
        return np.array([x.ndim], np.int32)
    if x.flags.c_contiguous or x.size == 0:
        return x
    # A view with strides: all elements from the first to the last that it can reach.
    if min(x.strides) < 0:
        raise ValueError(
            f"[metal_kernel] Input '{parameter.name}' has negative strides, which the emulator "
            "does not take: use ensure_row_contiguous=True."
        )
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) // x.itemsize
    return np.lib.stride_tricks.as_strided(x, (reach,), (x.itemsize,))
