"""The Metal kernels of a FlashHead as functions that launch them."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from .clustered import ClusteredRows
from .dense_kernels import Version, dense_kernel
from .kernel_text import (
    KERNELS,
    LANES,
    ROUTE_BODY,
    ROUTE_SIMDGROUPS,
    ROW_THREADS,
    ROWS,
    SCORE_BODY,
    SCORE_SIMDGROUPS,
    KernelText,
    header,
)
from .matrix import Matrix

Launch = Callable[..., list[mx.array]]


class StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them.

    The arrays end with a bias, if there is one.

    Args:
        stored: The rows.
        n_rows: The number of rows whose product has the same order of sums.
        version: Of the MLX that makes it; None: the installed one.
    """

    def __init__(self, stored: Matrix, n_rows: int, version: Version | None = None):
        maker = cast(str, stored.format.metal)
        names = stored.format.arrays
        self.kernel = dense_kernel(stored, n_rows, version)
        self.inputs = " ".join(names)
        self.arrays = list(stored.arrays().values())
        self.sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            # qmv_quad takes more: then only the order of the sums is another one
            self.sizes["WORDS"] = max(1, self.kernel.packs)
        self.names = " ".join(name for name in self.sizes if name in maker)
        self.expression = f"flash_head::{maker}({', '.join(names)})"
        self.files = f"{maker.partition('_rows')[0]} dot"


def make_kernels(
    clustered: ClusteredRows,
    centroids: StoredRows,
    rows: StoredRows | None,
    metal_kernel: Callable[..., Launch],
    row_threads: int,
) -> dict[str, Launch]:
    """Makes the kernels of a head, by name, each a function that launches it.

    Its arguments are the arrays of the inputs, the threadgroups (x, y), and for each output a pair
    of shape and dtype. Keywords are further template arguments.

    Args:
        clustered: The rows.
        centroids: The centroids, for ``route``.
        rows: The rows as they are stored, for ``score``; None if no kernel reads them.
        metal_kernel: Makes a kernel, as ``mx.fast.metal_kernel`` does.
        row_threads: Threads of a threadgroup of the kernels that have one for each position.
    """
    kernels = dict(KERNELS)
    kernels["route"] = KernelText(
        f"hidden {centroids.inputs} route_bias",
        "scores",
        ROUTE_BODY.format(rows=centroids.expression),
        files=f"{centroids.files} route",
        sizes=f"D C {centroids.names}",
        threads=LANES * ROUTE_SIMDGROUPS,
    )
    n_clusters, size = clustered.token_ids.shape
    sizes: dict[str, dict[str, int]] = {"route": centroids.sizes}
    if rows is not None:
        biased = clustered.rows.bias is not None
        kernels["score"] = KernelText(
            f"hidden probes token_ids {rows.inputs}{' bias' if biased else ''}",
            "logits best",
            SCORE_BODY.format(
                rows=rows.expression, bias="bias" if biased else "flash_head::NoBias{}"
            ),
            files=f"{rows.files} score",
            sizes=f"D N V PADDED {rows.names}",
            threads=LANES * min(SCORE_SIMDGROUPS, -(-size // ROWS)),
        )
        sizes["score"] = rows.sizes
    common = {
        "V": clustered.vocab_size,
        "C": n_clusters,
        "N": size,
        "D": clustered.rows.hidden_size,
        "PADDED": clustered.padded,
    }
    return {
        name: make_kernel(name, text, common | sizes.get(name, {}), metal_kernel, row_threads)
        for name, text in kernels.items()
    }


def make_kernel(
    name: str,
    text: KernelText,
    sizes: dict[str, int],
    metal_kernel: Callable[..., Launch],
    row_threads: int = ROW_THREADS,
) -> Launch:
    """Makes one kernel, a function as :func:`make_kernels` has them.

    Args:
        name: Its name, without the prefix of all kernels.
        text: Its text.
        sizes: Template arguments, of which it takes those that the text names.
        metal_kernel: Makes it, as ``mx.fast.metal_kernel`` does.
        row_threads: As of :func:`make_kernels`.
    """
    kernel = metal_kernel(
        name=f"flash_head_{name}",
        input_names=text.inputs.split(),
        output_names=text.outputs.split(),
        header=header(*text.files.split(), row_threads=row_threads),
        source=text.body,
    )
    threads = text.threads or row_threads
    known = [(size, sizes[size]) for size in text.sizes.split()]

    def launch(
        arrays: list[mx.array],
        x: int,
        y: int,
        *results: tuple[tuple[int, ...], mx.Dtype],
        **more: Any,
    ) -> list[mx.array]:
        return kernel(
            inputs=arrays,
            template=[*known, *more.items()],
            grid=(threads * x, y, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in results],
            output_dtypes=[dtype for _, dtype in results],
        )

    return launch
