"""A head's kernels in a file, for programs in other languages.

The safetensors file holds the FlashHead's arrays, and in its metadata a plan, the kernels and their
launches as `MetalOperations` gives them to MLX, with the sums of the MLX in Swift. A program that
has MLX and the model's own rows replays them one after the other, as `metal/swift` does. The plan
is JSON:

    head       path of the model's output layer, such as "model.embed_tokens"
    dtype      of the hidden states, whose size is "hiddenSize"
    rows       shape and dtype of each array of that layer: the program's model must have the same
    limit      more positions than this at once read more rows than the dense head
    logits     names of the launches that give "expanded", the full logits (1, V), in their order
    tokens     names of the launches that give "tokens" (1,), in their order, from "settings",
               "top_k" and "keys" as `Draws` has them, 8 entries or more: MLX passes a shorter
               array in another way, with another kernel
    launches   by name: the arguments of MLX's ``metalKernel`` and of the call; ``arrays`` are the
               file's, results so far, the rows as "rows_weight" …, and "hidden" (1, D)

For R positions the second number of each grid and the first of each shape are R times as large.
Rows are in the order of "token_ids", with any row in a padded slot. "slot_of" says a token's place
in that order.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .draws.draw import Draws
from .draws.noise import Noise
from .flash_head import FlashHead
from .kernel_inputs import SHORTEST
from .metal_operations import MetalOperations

METADATA_KEY = "flash_head"
# The MLX that mlx-swift 0.31.6 contains, at commit ce45c525. The file's scores have the sums that
# the model's own layer has there: of some values of a 16-bit state in their own dtype.
READER = (0, 31, 1)
# The launches that give logits, and those that give a token.
FOR_LOGITS = [
    "flash_head_route",
    "flash_head_select_words",
    "flash_head_score",
    "flash_head_expand",
]
FOR_TOKENS = [
    "flash_head_route",
    "flash_head_select",
    "flash_head_score",
    "flash_head_sample",
]


def export_plan(head: FlashHead, layer: str, dtype: mx.Dtype, path: Path) -> dict[str, mx.array]:
    """Writes the file of a head at a layer of a model.

    The file scores as many clusters as ``head`` does.

    Args:
        head: The head.
        layer: The name of the layer that it replaces.
        dtype: Of the hidden states.
        path: Where the file is written.

    Returns:
        The file's arrays.

    Raises:
        ValueError: If the Metal kernels do not read the head's rows.
    """
    clustered = head.clustered
    n_probes = head.unverified_probes
    if clustered.rows.format.metal is None:
        raise ValueError(
            f"The Metal kernels do not read {clustered.rows.format} rows: export a model whose "
            "head has 4, 5, 6, 8, 16 or 32 bits."
        )
    hidden = mx.zeros((1, head.hidden_size), dtype)
    counts = mx.zeros((SHORTEST, 2), mx.uint32)
    draws = Draws((Noise(1.0),), (mx.zeros((SHORTEST, 3)), counts[:, 0], counts))
    settings, top_k, keys = draws.inputs
    computed = {"hidden": hidden, "settings": settings, "top_k": top_k, "keys": keys}
    rows = {}
    for name, array in clustered.rows.arrays().items():
        computed[f"rows_{name}"] = array
        rows[name] = {"shape": [head.vocab_size, *array.shape[2:]], "dtype": array.dtype}
    stored = {}
    for name, array in clustered.centroids.matrix.arrays().items():
        stored[f"centroids_{name}"] = array
    recorder = _Recorder(stored, computed)
    operations = MetalOperations(clustered, recorder.metal_kernel, version=READER)
    scores = operations.route(hidden)
    selection = operations.select(scores, n_probes)
    candidates = operations.score(hidden, selection)
    operations.expand(scores, selection, candidates)
    selection = operations.select(scores, n_probes, words=False)
    candidates = operations.score(hidden, selection)
    operations.choose(selection, candidates, draws)
    plan = {
        "head": layer,
        "dtype": dtype,
        "hiddenSize": head.hidden_size,
        "rows": rows,
        "limit": head.n_clusters // n_probes,
        "logits": FOR_LOGITS,
        "tokens": FOR_TOKENS,
        "launches": recorder.launches,
    }
    text = json.dumps(plan, default=_name_of_dtype)
    mx.save_safetensors(str(path), recorder.stored, {METADATA_KEY: text})
    return recorder.stored


def _name_of_dtype(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


class _Recorder:
    """Writes launches down in place of ``mx.fast.metal_kernel``, and runs nothing.

    Args:
        stored: Arrays of the file, by name.
        computed: Arrays that the program has or computes.

    Attributes:
        stored: The arrays of the file: those, and all others that a launch reads.
        launches: The launches, by name.
    """

    def __init__(self, stored: dict[str, mx.array], computed: dict[str, mx.array]):
        self.stored = stored
        self.launches: dict[str, dict[str, Any]] = {}
        self._computed = computed

    def metal_kernel(self, **kernel: Any) -> Callable[..., list[mx.array]]:
        """Takes the arguments of ``mx.fast.metal_kernel``; the result records its calls."""
        return partial(self._record, kernel)

    def _record(self, kernel: dict[str, Any], **call: Any) -> list[mx.array]:
        name = kernel["name"]
        input_names = kernel["input_names"]
        output_names = kernel["output_names"]
        shapes = call["output_shapes"]
        dtypes = call["output_dtypes"]
        arrays = list(map(self._name_of, call["inputs"], input_names))
        template = [{"name": size, "value": value} for size, value in call["template"]]
        self.launches[name] = {
            "name": name,
            "inputNames": input_names,
            "outputNames": output_names,
            "source": kernel["source"],
            "header": kernel["header"],
            "arrays": arrays,
            "template": template,
            "grid": call["grid"],
            "threadGroup": call["threadgroup"],
            "outputShapes": shapes,
            "outputDTypes": dtypes,
        }
        results = list(map(mx.zeros, shapes, dtypes))
        self._computed.update(zip(output_names, results, strict=True))
        return results

    def _name_of(self, array: mx.array, input_name: str) -> str:
        """The name of an array in the plan; one that is not known yet is stored."""
        for name, known in (self._computed | self.stored).items():
            if known is array:
                return name
        self.stored[input_name] = array
        return input_name
