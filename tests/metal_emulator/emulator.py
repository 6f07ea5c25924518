"""Stands in for ``mx.fast.metal_kernel`` where there is no Metal."""

import contextlib
from functools import partial

import mlx.core as mx
import numpy as np

from .build import compile_kernel
from .run import INPUT, OUTPUT, Buffer, launch
from .signature import ATTRIBUTES, metal_kernel, signature_of

MAX_THREADS_PER_THREADGROUP = 1024


class Emulator:
    """Runs custom Metal kernels on the CPU, with checks and counts.

    Args:
        order: Of threads and threadgroups, ``forward``, ``reverse`` or ``shuffle``: a correct
            kernel gives the same outputs in each. ``seed`` is that of the shuffled order.
        check: Whether to check and count accesses. Without, kernels run several times faster, and
            only compile errors, divergent barriers and too much threadgroup memory are found.
        max_threads: By a kernel's name, the threads its pipeline allows in a threadgroup: on a
            device fewer than 1,024 where a kernel takes many registers.
        contract: How the compiler joins products and sums: ``off``, ``on`` or ``fast``.
    """

    def __init__(self, order="forward", seed=0, check=True, max_threads=None, contract="off"):
        self.order = order
        self.seed = seed
        self.check = check
        self.contract = contract
        if max_threads is None:
            max_threads = {}
        self.max_threads = max_threads
        # One of each launch so far.
        self.dispatches = []
        # The texts of the kernels that were compiled: MLX keeps a library for each.
        self.built = set()

    def metal_kernel(self, **options):
        """Takes and refuses what ``mx.fast.metal_kernel`` does; the result is called likewise."""
        metal_kernel(**options)
        return partial(self._run, options)

    @contextlib.contextmanager
    def installed(self):
        """Puts the emulator in MLX's place, so that code asking for Metal finds it."""
        saved = mx.fast.metal_kernel, mx.metal.is_available
        mx.fast.metal_kernel = self.metal_kernel
        mx.metal.is_available = lambda: True
        try:
            yield self
        finally:
            mx.fast.metal_kernel, mx.metal.is_available = saved

    def _run(
        self, options, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None
    ):
        """Runs a kernel, made with ``options``, at once: MLX would wait until it is needed."""
        arrays = []
        for each in inputs:
            # An input may also be a number.
            if not isinstance(each, mx.array):
                each = mx.array(each)
            arrays.append(each)
        mx.eval(arrays)
        if template is None:
            template = []
        call = {"grid": grid, "threadgroup": threadgroup, "template": template}
        outputs = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        signature = signature_of(options, arrays, call | outputs)
        name = options["name"]
        n_threads = int(np.prod(threadgroup))
        allowed = self.max_threads.get(name, MAX_THREADS_PER_THREADGROUP)
        if n_threads > allowed:
            raise ValueError(
                f"Thread group size ({n_threads}) is greater than  the maximum allowed threads per "
                f"threadgroup ({allowed})."
            )
        # As MLX dispatches them, no threadgroup is larger than the grid.
        threadgroup = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
        data = dict(zip(options["input_names"], map(bits_of, arrays), strict=True))
        forms = zip(output_shapes, output_dtypes, strict=True)
        forms = dict(zip(options["output_names"], forms, strict=True))
        buffers = []
        for parameter in signature.parameters:
            if parameter in forms:
                shape, dtype = forms[parameter]
                n_bytes = int(np.prod(shape)) * dtype.size
                buffers.append(Buffer(parameter, OUTPUT, dtype.size, n_bytes))
                # This is NaN in every floating dtype.
                buffers[-1].data[:] = 0xFF
            elif parameter not in ATTRIBUTES:
                values = input_values(parameter, data)
                buffers.append(Buffer(parameter, INPUT, values.itemsize, values.nbytes))
                buffers[-1].data[:] = values.reshape(-1).view(np.uint8)
        self.built.add(signature.text)
        form = (signature.name, self.check, self.contract)
        library = compile_kernel(signature.text, signature.entry(), *form)
        settings = (tuple(grid), threadgroup, self.order, self.seed, self.check)
        self.dispatches.append(launch(name, library, buffers, *settings))
        return [
            mx.array(made.data.view(f"u{dtype.size}")).view(dtype).reshape(tuple(shape))
            for made, (shape, dtype) in zip(buffers[-len(forms) :], forms.values(), strict=True)
        ]


def bits_of(array: mx.array) -> np.ndarray:
    """The array as numpy, row after row; bfloat16, which numpy lacks, as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    mx.eval(array)
    return np.ascontiguousarray(array).reshape(array.shape)


def input_values(name: str, data: dict[str, np.ndarray]) -> np.ndarray:
    """What one parameter of an input holds: its memory, shape, strides in elements, or ndim."""
    if name in data:
        return data[name]
    of, _, role = name.rpartition("_")
    x = data[of]
    if role == "strides":
        return np.array(x.strides, np.int64) // x.itemsize
    if role == "shape":
        return np.array(x.shape, np.int32)
    return np.array([x.ndim], np.int32)
