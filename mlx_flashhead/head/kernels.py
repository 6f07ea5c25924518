"""The Metal kernels as functions: the text that each one needs, and its launch.

``metal_operations.py`` launches those of a head.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from .clustered import ClusteredRows
from .kernel_texts import KERNELS, ROW_THREADS, KernelText, route_text, score_text
from .stored_rows import StoredRows

Launch = Callable[..., list[mx.array]]


@cache
def part(name: str) -> str:
    """The text of one file of the kernels: of the installed package, or beside it in a checkout."""
    folder = Path(__file__).parents[1]
    if not (folder / "metal").is_dir():
        folder = folder.parent
    return (folder / "metal" / "flash_head" / f"{name}.h").read_text(encoding="utf-8")


@cache
def header(*names: str, row_threads: int = ROW_THREADS) -> str:
    """Joins the files that a kernel needs, beginning with those that all kernels need.

    The text has no comments and no indentation: MLX copies and hashes this text at every call of a
    kernel (docs/speed.md).

    Args:
        names: The files, without those that all kernels need.
        row_threads: Threads of a kernel with one threadgroup a position.
    """
    files = ("constants", "values", "logit_map", *names)
    lines = []
    for file in files:
        for line in part(file).splitlines():
            code = line.split("//")[0].strip()
            if code:
                lines.append(code + "\n")
    text = "".join(lines)
    if row_threads != ROW_THREADS:
        text = f"#define FLASH_HEAD_ROW_THREADS {row_threads}\n{text}"
    return text


def make_kernels(
    clustered: ClusteredRows,
    centroids: StoredRows,
    rows: StoredRows | None,
    metal_kernel: Callable[..., Any],
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
    n_clusters, cluster_size = clustered.token_ids.shape
    texts = dict(KERNELS)
    texts["route"] = route_text(centroids)
    sizes = {"route": centroids.sizes}
    if rows is not None:
        biased = clustered.rows.bias is not None
        texts["score"] = score_text(rows, cluster_size, biased=biased)
        sizes["score"] = rows.sizes
    common = {
        "V": clustered.vocab_size,
        "C": n_clusters,
        "N": cluster_size,
        "D": clustered.rows.hidden_size,
        "PADDED": clustered.padded,
    }
    kernels = {}
    for name, text in texts.items():
        known = common | sizes.get(name, {})
        kernels[name] = make_kernel(name, text, known, metal_kernel, row_threads)
    return kernels


def make_kernel(
    name: str,
    text: KernelText,
    sizes: dict[str, int],
    metal_kernel: Callable[..., Any],
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
    kernel: Launch = metal_kernel(
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
        shapes = [shape for shape, _ in results]
        dtypes = [dtype for _, dtype in results]
        return kernel(
            inputs=arrays,
            template=[*known, *more.items()],
            grid=(threads * x, y, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=shapes,
            output_dtypes=dtypes,
        )

    return launch
