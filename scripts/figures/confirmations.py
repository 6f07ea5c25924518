"""What a Mac has to confirm of MLX's kernels and of ours: metal/README.md.

    python scripts/figures/confirmations.py smollm2-flashhead --json confirmed.json

The sums and the rounding of products, what kernels may ask of the GPU, what is compiled when, the
times of known heads, what Python takes of a token's time, and whether steps of several tokens have
the bits of single ones. On a CPU MLX's own operations compute the same, which says how the file
looks.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from host_time import host_times
from mlx_flashhead.benchmarks import SAMPLERS, SHAPES
from mlx_flashhead.benchmarks.head_benchmark import random_head
from mlx_flashhead.benchmarks.model_benchmark import PROMPT
from mlx_flashhead.benchmarks.reporting import machine
from mlx_flashhead.benchmarks.variants import with_flash_head
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.backend import gpu_is_default
from mlx_flashhead.head.chosen_operations import make_operations
from mlx_flashhead.head.clustered import Centroids, ClusteredRows
from mlx_flashhead.head.dense_kernels import dense_kernel
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import FORMATS, Format, Matrix, as_float32
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.rounded_product import CLASSES, may_use_tf32
from mlx_flashhead.head.same_sums import logits_of_scores
from mlx_flashhead.loading.load import load
from mlx_flashhead.models.install import hidden_dtype, installed_head
from mlx_flashhead.models.vlm import is_vlm
from wide_parts import wide_figures

CLUSTER_SIZE = 16
# Rows and columns: whole blocks, a remainder of the rows, and one of the columns.
SIZES = ((4096, 1024), (4099, 1024), (4096, 576))
WIDTHS = (576, 1024, 2048)
N_ROWS = 4096
# A CPU times heads of these shapes.
SMALL = ("smollm2",)
N_STATES = 8
REPEATS = 5
# No pipeline allows so many: the refusal names the number that it allows.
TOO_MANY_THREADS = 2048
ALLOWED = re.compile(r"allowed threads per threadgroup \((\d+)\)")
# Tokens.
ANSWER = 48


def confirmed(model: str) -> Iterator[tuple[str, Any]]:
    """Everything that a machine confirms with a model, JSON-ready, in a few minutes.

    Yields:
        ``first_token``, ``kernels``, ``rounding`` of the model's head, ``sums``, ``products``,
        ``heads``, ``host`` and, but for a model of mlx-vlm, ``wide``, each with its figures.
    """
    loaded, tokenizer = load(model)
    head = installed_head(loaded)
    dtype = hidden_dtype(loaded)
    policy_of(head).dense = False
    variant = with_flash_head(loaded, verify=True)
    prompt = tokenizer.encode(PROMPT)

    def seconds(sampler: str, n_tokens: int) -> float:
        start = time.perf_counter()
        variant.decode(prompt, 1, n_tokens, SAMPLERS[sampler])
        return time.perf_counter() - start

    yield "first_token", [seconds("greedy", 1) for _ in range(2)]
    yield "kernels", _kernels(head, dtype, partial(seconds, n_tokens=ANSWER))
    bounds = head.measure_rounding(dtype)
    yield "rounding", {size: _rounding_figures(each) for size, each in bounds.items()}
    yield "sums", list(sums(SIZES))
    yield "products", list(products(WIDTHS))
    if gpu_is_default():
        yield "heads", list(head_times(tuple(SHAPES), bits=(4, 16)))
    else:
        # A CPU's products of 4 bits take seconds.
        yield "heads", list(head_times(SMALL, bits=(16,)))
    yield "host", host_times(loaded, prompt)
    if not is_vlm(loaded):
        yield "wide", wide_figures(loaded, prompt)


def _rounding_figures(rounding: Any) -> dict[str, Any]:
    figures = {name: value for name, value in asdict(rounding).items() if name != "sums"}
    return figures | {"rounded_sums": rounding.sums is not None}


class CountedKernels:
    """In the place of ``mx.fast.metal_kernel``: notes what MLX compiles, and what pipelines allow.

    Attributes:
        texts: One for each kernel that MLX has compiled: its name, template arguments, and of each
            input the dtype, whether it is a number, and whether it has fewer than 8 elements.
        limits: The most threads of a threadgroup, by kernel; measured if ``measures`` is set.
    """

    def __init__(self, metal_kernel: Callable[..., Any] | None = None):
        self._metal_kernel: Callable[..., Any] = metal_kernel or mx.fast.metal_kernel
        self.texts: set[tuple[Any, ...]] = set()
        self.limits: dict[str, int] = {}
        self.measures = False

    def metal_kernel(self, **options: Any) -> Callable[..., list[mx.array]]:
        """Makes a kernel as ``mx.fast.metal_kernel`` does, and notes what is compiled."""
        kernel = self._metal_kernel(**options)
        name = options["name"].removeprefix("flash_head_")

        def launch(**call: Any) -> list[mx.array]:
            inputs = [(str(x.dtype), x.ndim == 0, x.size < 8) for x in call["inputs"]]
            template = [(key, str(value)) for key, value in call["template"]]
            self.texts.add((name, *template, *inputs))
            if self.measures and name not in self.limits:
                self._measure(name, kernel, call)
            return kernel(**call)

        return launch

    def _measure(self, name: str, kernel: Callable[..., Any], call: dict[str, Any]) -> None:
        """Asks for more threads than any pipeline allows: the refusal names its number."""
        x, y, z = call["grid"]
        wide = {"grid": (max(x, TOO_MANY_THREADS), y, z), "threadgroup": (TOO_MANY_THREADS, 1, 1)}
        try:
            mx.eval(kernel(**call | wide))
        except (RuntimeError, ValueError) as error:
            said = ALLOWED.search(str(error))
            if said is not None:
                self.limits[name] = int(said[1])


def _kernels(
    head: FlashHead, dtype: mx.Dtype, answer: Callable[[str], float]
) -> dict[str, Any] | None:
    """Returns texts that are compiled by an installation and afterwards, and pipelines' limits.

    None without kernels.
    """
    if not isinstance(head.operations, MetalOperations):
        return None
    counted = CountedKernels()
    head._chosen.operations = MetalOperations(head.clustered, counted.metal_kernel)
    head.check_kernels(dtype)
    at_installation = len(counted.texts)
    for sampler in SAMPLERS:
        answer(sampler)
    compiled_later = len(counted.texts) - at_installation
    counted.measures = True
    head.check_kernels(dtype)
    return {
        "backend_reason": head.backend_reason,
        "compiled_at_installation": at_installation,
        "compiled_later": compiled_later,
        "allowed_threads": counted.limits,
    }


def random_rows(form: Format, n_rows: int, hidden_size: int, dtype: mx.Dtype) -> Matrix | None:
    """Random rows of a format; None where MLX has no such rows of this width."""
    weight = mx.random.normal((n_rows, hidden_size), key=mx.random.key(0)) * 0.05
    rows = Matrix(weight.astype(dtype))
    if form.mode is None:
        return rows
    group_size = min(form.group_sizes, key=lambda size: abs(size - 64))
    if hidden_size % group_size:
        return None
    return rows.quantize(bits=form.bits, group_size=group_size, mode=form.mode)


def sums(
    sizes: Sequence[tuple[int, int]], forms: Sequence[Format] = FORMATS
) -> Iterator[dict[str, Any]]:
    """Yields which share of a state's logits has the very sums of MLX's product.

    That is the product with the rows in the model's order, for each format and size.

    Args:
        sizes: Rows and columns.
        forms: Formats that the kernels read; others are left out.

    Yields:
        ``format``, ``rows``, ``columns``, ``dtype``, the name of MLX's ``kernel``, whether the
        table of kernels expects equal scores, and the shares of ``scored`` and ``dense`` logits.
    """
    for form in forms:
        if form.metal is None:
            continue
        dtypes = (mx.bfloat16, mx.float16)
        if form.bits == 32:
            dtypes = (mx.float32,)
        for n_rows, hidden_size in sizes:
            for dtype in dtypes:
                rows = random_rows(form, n_rows, hidden_size, dtype)
                if rows is None:
                    continue
                operations = make_operations(_clustered(rows), None)[0]
                state = mx.random.normal((1, hidden_size), key=mx.random.key(1)).astype(dtype)
                expected = rows.matmul(state)
                kernel = dense_kernel(rows, n_rows)
                yield {
                    "format": str(form),
                    "rows": n_rows,
                    "columns": hidden_size,
                    "dtype": _name(dtype),
                    "kernel": kernel.name,
                    "equal_expected": kernel.scored and operations.name == MetalOperations.name,
                    "scored": _share_equal(logits_of_scores(operations, state), expected),
                    "dense": _share_equal(operations.dense(state), expected),
                }


def products(widths: Sequence[int], sizes: Sequence[int] = CLASSES) -> Iterator[dict[str, Any]]:
    """Yields how far products of several states lie from those of single ones.

    They are in float32 with and without quantized rows, where an M5 takes TF32, and in bfloat16.

    Args:
        widths: Columns of the rows.
        sizes: Numbers of states.

    Yields:
        ``format``, ``dtype``, ``columns``, ``states``, and the largest ``distance`` as a share of
        the lengths of state and row; whether the bounds take TF32 into account.
    """
    floats = next(form for form in FORMATS if form.mode is None)
    eight_bits = next(form for form in FORMATS if form.bits == 8 and form.mode == "affine")
    for form, dtype in ((floats, mx.float32), (eight_bits, mx.float32), (floats, mx.bfloat16)):
        for width in widths:
            rows = random_rows(form, N_ROWS, width, dtype)
            if rows is None:
                continue
            key = mx.random.key(2)
            states = mx.random.normal((max(sizes), width), key=key).astype(dtype)
            alone = mx.concatenate([rows.matmul(states[i : i + 1]) for i in range(N_STATES)])
            lengths = mx.linalg.norm(states[:N_STATES].astype(mx.float32), axis=-1)[:, None]
            lengths = lengths * mx.linalg.norm(rows.dequantized(mx.float32), axis=-1)
            for size in sizes:
                parts = [rows.matmul(states[i : i + size]) for i in range(0, N_STATES, size)]
                together = mx.concatenate(parts)[:N_STATES]
                distance = mx.abs(together.astype(mx.float32) - alone.astype(mx.float32))
                yield {
                    "format": str(form),
                    "dtype": _name(dtype),
                    "columns": width,
                    "states": size,
                    "distance": float(np.max(as_float32(distance / lengths))),
                    "tf32_expected": may_use_tf32() and dtype == mx.float32 and size > 1,
                }


def head_times(shapes: Sequence[str], bits: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Times of the heads of known models, of random weights in bfloat16: the median of a few.

    Args:
        shapes: Names of `SHAPES`.
        bits: Of the rows.

    Yields:
        ``shape``, ``bits``, and the milliseconds of the ``dense`` product, of a ``proposal`` and of
        the product of a ``verification`` of 32 states.
    """
    for shape in shapes:
        for n_bits in bits:
            head = random_head(*SHAPES[shape], dtype=mx.bfloat16, bits=n_bits)
            states = mx.random.normal((CLASSES[-1], head.hidden_size)).astype(mx.bfloat16)
            state = states[:1]
            mx.eval(states)
            yield {
                "shape": shape,
                "bits": n_bits,
                "dense": _milliseconds(head.dense_logits, state),
                "proposal": _milliseconds(partial(_proposed, head), state),
                "verification": _milliseconds(head.operations.verifying_product, states),
            }
            del head
            mx.clear_cache()


def _clustered(rows: Matrix) -> ClusteredRows:
    """The rows in random clusters, with centroids that are not used."""
    n_clusters = -(-rows.n_rows // CLUSTER_SIZE)
    slots = np.full(n_clusters * CLUSTER_SIZE, rows.n_rows)
    slots[: rows.n_rows] = np.random.default_rng(0).permutation(rows.n_rows)
    centroids = Centroids(
        Matrix(mx.zeros((n_clusters, rows.hidden_size), mx.float16)),
        mx.zeros(n_clusters),
        mx.zeros(n_clusters),
    )
    return ClusteredRows.build(rows, slots.reshape(n_clusters, -1), centroids)


def _share_equal(found: mx.array, expected: mx.array) -> float:
    return float(np.mean(as_float32(found == expected)))


def _milliseconds(function: Callable[[mx.array], mx.array], states: mx.array) -> float:
    """The median of some calls, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        mx.eval(function(states))
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def _proposed(head: FlashHead, states: mx.array) -> mx.array:
    return head.propose(states, None).tokens


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/confirmations.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model with a FlashHead")
    parser.add_argument("--json", type=writable, metavar="FILE", required=True, help="the figures")
    args = parser.parse_args()
    figures: dict[str, Any] = {"kind": "confirmations", "machine": machine()}
    for name, value in confirmed(args.model):
        print(f"Confirmed: {name}", file=sys.stderr, flush=True)
        figures[name] = value
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
