"""The Metal kernels of a FlashHead: the text, inputs, outputs, threads and sizes of each.

``kernel_text.py`` has their texts, and ``metal_steps.py`` launches them.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from . import kernel_text as text
from .clustered import ClusteredRows
from .dense_kernels import DenseKernel, Version, dense_kernel
from .draws import filters
from .matrix import Matrix

Launch = Callable[..., list[mx.array]]

# The constants of the same names in metal/flash_head/constants.h.
LANES = 32
ROWS = 4
ROUTE_SIMDGROUPS = 2
SCORE_SIMDGROUPS = 8
WIDE_THREADS = 256
EXPAND_TOKENS = 4
SCREEN_CLUSTERS = 1024
TALLIED = 10

JOINED = 8  # sources of a join: Metal has 31 buffers


class Kernels:
    """The kernels of a head, each a function that launches it.

    Its arguments are the arrays of the inputs, the threadgroups (x, y), and for each output a pair
    of shape and dtype. Keywords are further template arguments.

    Args:
        clustered: The rows.
        metal_kernel: Makes the kernels, as ``mx.fast.metal_kernel`` does.
        row_threads: Threads of a threadgroup of the kernels that have one for each position.
        version: Of the MLX whose sums the scores have; None: the installed one.

    Attributes:
        tail_offset: (C,) float32, an input of ``select_words``.
        route_arrays: The inputs of ``route`` beside the states.
        score_arrays: The inputs of ``score`` beside the states and the probes.
        adds_in_dtype: Whether ``score`` adds hidden values in the dtype of the product.
    """

    def __init__(
        self,
        clustered: ClusteredRows,
        metal_kernel: Callable[..., Any],
        row_threads: int,
        version: Version | None = None,
    ):
        self.tail_offset = clustered.centroids.tail_offset.astype(mx.float32)
        self._metal_kernel = metal_kernel
        self._row_threads = row_threads
        n_clusters, size = clustered.token_ids.shape
        self._sizes = {
            "V": clustered.vocab_size,
            "C": n_clusters,
            "N": size,
            "D": clustered.rows.hidden_size,
            "PADDED": clustered.padded,
        }
        self._make_route(clustered)
        if clustered.rows.format.metal is not None:
            self._make_score(clustered, version)
        self._make_selects()
        self._make_proposals()
        self._make_verifications()

    def _make_route(self, clustered: ClusteredRows) -> None:
        """The kernel that scores the centroids."""
        stored = StoredRows(clustered.centroids.matrix, clustered.n_clusters)
        self.route_arrays = [*stored.arrays, clustered.route_bias]
        self._sizes |= stored.sizes
        self.route = self._kernel(
            "route",
            f"hidden {stored.inputs} route_bias",
            "scores",
            text.ROUTE_BODY.format(rows=stored.expression),
            files=f"{stored.files} route",
            threads=LANES * ROUTE_SIMDGROUPS,
            sizes=f"D C {stored.names}",
        )

    def _make_score(self, clustered: ClusteredRows, version: Version | None) -> None:
        """The kernel that scores the rows of the probes."""
        stored = StoredRows(clustered.rows, clustered.vocab_size, version)
        bias = [] if clustered.rows.bias is None else [clustered.rows.bias]
        self.score_arrays = [clustered.token_ids, *stored.arrays, *bias]
        self.adds_in_dtype = stored.kernel.added > 1
        self._sizes |= stored.sizes
        self.score = self._kernel(
            "score",
            f"hidden probes token_ids {stored.inputs}{' bias' if bias else ''}",
            "logits best",
            text.SCORE_BODY.format(
                rows=stored.expression, bias="bias" if bias else "flash_head::NoBias{}"
            ),
            files=f"{stored.files} score",
            threads=LANES * min(SCORE_SIMDGROUPS, -(-clustered.cluster_size // ROWS)),
            sizes=f"D N V PADDED {stored.names}",
        )

    def _make_selects(self) -> None:
        """The kernels that select clusters: plain ones, some in any case, or with words for all."""
        self.select = self._kernel(
            "select",
            "scores n_probes depth",
            "probes unscored",
            text.SELECT_BODY.format(marks="", words="NoWords{}", forced="NotForced{}"),
            files="histogram select",
            threads=self._row_threads,
            sizes="C N",
        )
        self.select_forced = self._kernel(
            "select_forced",
            "scores adjustment latest slot_of n_probes depth",
            "probes unscored",
            text.SELECT_BODY.format(marks=text.MARKS, words="NoWords{}", forced=text.FORCED),
            files="histogram select",
            threads=self._row_threads,
            sizes="C N V",
        )
        words = "cluster_words(words, tail_offset)"
        self.select_words = self._kernel(
            "select_words",
            "scores tail_offset n_probes depth",
            "probes unscored words",
            text.SELECT_BODY.format(marks="", words=words, forced="NotForced{}"),
            files="histogram select",
            threads=self._row_threads,
            sizes="C N",
        )

    def _make_proposals(self) -> None:
        """The kernels that change scored logits, choose by them, and keep what they have chosen."""
        self.expand = self._kernel(
            "expand",
            "words slot_of logits best",
            "expanded",
            text.EXPAND_BODY,
            files="expand",
            threads=WIDE_THREADS,
            sizes="V C N",
        )
        self.sample = self._kernel(
            "sample",
            "probes token_ids logits best unscored settings top_k keys fit",
            "tokens risk",
            text.SAMPLE_BODY,
            files="histogram noise sample",
            threads=self._row_threads,
            sizes="N V",
        )
        sources = " ".join(f"hidden_{i} probes_{i} logits_{i}" for i in range(JOINED))
        cases = "\n".join(text.JOIN_CASE.format(i=i) for i in range(JOINED))
        self.join = self._kernel(
            "join",
            f"{sources} rows",
            "hidden probes logits",
            text.JOIN_BODY.format(cases=cases),
            files="join",
            threads=WIDE_THREADS,
            sizes="D N",
        )
        self.adjust = self._kernel(
            "adjust",
            "probes token_ids logits adjustment latest allowed",
            "changed best",
            text.ADJUST_BODY,
            files="adjust",
            threads=WIDE_THREADS,
            sizes="N V",
        )

    def _make_verifications(self) -> None:
        """The kernels that judge proposals by the dense logits."""
        self.screen = self._kernel(
            "screen",
            "slots probes token_ids slot_of logits tokens settings keys product_tolerance "
            "scored_tolerance relative allowed",
            "parts",
            text.SCREEN_BODY,
            files="noise tally screen",
            threads=WIDE_THREADS,
            sizes="C N V PADDED",
        )
        self.certain = self._kernel(
            "certain",
            "parts probes token_ids logits tokens settings top_k keys product_tolerance "
            "scored_tolerance relative epsilon",
            "sure known",
            text.CERTAIN_BODY,
            files="noise tally certain",
            threads=self._row_threads,
            sizes="N V",
        )
        self.tolerance = self._kernel(
            "tolerance",
            "hidden shares",
            "product scored",
            text.TOLERANCE_BODY,
            files="tolerance",
            threads=WIDE_THREADS,
            sizes="D",
        )
        self.lowest_kept = self._kernel(
            filters.KERNEL,
            "logits settings top_k log_total",
            "kept",
            text.LOWEST_KEPT_BODY,
            files="histogram noise sample",
            threads=self._row_threads,
            sizes="",
        )
        self.map = self._kernel(
            "map", "values", "mapped", text.MAP_BODY, files="", threads=WIDE_THREADS, sizes=""
        )

    def _kernel(
        self,
        name: str,
        inputs: str,
        outputs: str,
        body: str,
        *,
        files: str,
        threads: int,
        sizes: str,
    ) -> Launch:
        """Makes a kernel.

        Args:
            name: Its name, without the prefix of all kernels.
            inputs: The names of its inputs.
            outputs: The names of its outputs.
            body: A call of the kernel's function.
            files: The files of ``metal/flash_head/`` that the body needs.
            threads: The threads of a threadgroup.
            sizes: The template arguments that are the same for all launches.
        """
        kernel = self._metal_kernel(
            name=f"flash_head_{name}",
            input_names=inputs.split(),
            output_names=outputs.split(),
            header=text.header(*files.split(), row_threads=self._row_threads),
            source=body,
        )
        known = [(size, self._sizes[size]) for size in sizes.split()]

        def launch(
            arrays: list[mx.array],
            x: int,
            y: int,
            *results: tuple[tuple[int, ...], mx.Dtype],
            **more: Any,
        ) -> list[mx.array]:
            outputs: list[mx.array] = kernel(
                inputs=arrays,
                template=[*known, *more.items()],
                grid=(threads * x, y, 1),
                threadgroup=(threads, 1, 1),
                output_shapes=[shape for shape, _ in results],
                output_dtypes=[dtype for _, dtype in results],
            )
            return outputs

        return launch


class StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them.

    Args:
        stored: The rows.
        n_rows: The number of rows whose product has the same order of sums.
        version: Of the MLX that makes it; None: the installed one.
    """

    def __init__(self, stored: Matrix, n_rows: int, version: Version | None = None):
        maker = cast(str, stored.format.metal)
        names = stored.format.arrays
        self.kernel: DenseKernel = dense_kernel(stored, n_rows, version)
        self.inputs = " ".join(names)
        self.arrays = [stored.arrays()[name] for name in names]
        self.sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            # qmv_quad takes more: then only the order of the sums is another one
            self.sizes["WORDS"] = max(1, self.kernel.packs)
        self.names = " ".join(name for name in self.sizes if name in maker)
        self.expression = f"flash_head::{maker}({', '.join(names)})"
        self.files = f"{maker.partition('_rows')[0]} dot"
