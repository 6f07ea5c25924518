"""A head's kernels in a file, for programs in other languages.

The file is a safetensors file. It holds the FlashHead's arrays, and in its metadata a plan: the
texts of the kernels and their launches, as `MetalSteps` gives them to MLX. A program that has MLX
and the model's own rows replays the launches one after the other. `metal/swift` does so in Swift.

The plan is JSON:

    head       path of the model's output layer, such as "model.embed_tokens"
    dtype      dtype of the hidden states
    hiddenSize their size D
    rows       shape and dtype of each array of that layer: the program's model must have the same
    limit      more positions than this at once read more rows than the dense head
    logits     names of the launches that give "expanded", the full logits (1, V), in their order
    tokens     names of those that give "tokens" (1,) from "settings" (1, 3) float32, "top_k" (1,)
               uint32 and "keys" (1, 2) uint32, which are those of ``MetalSteps.choose``
    launches   by name
               name, inputNames, outputNames, source, header: arguments of MLX's ``metalKernel``
               arrays: names of the inputs among the file's arrays, the results so far, the rows as
               "rows_weight" …, and "hidden" (1, D)
               template, grid, threadGroup, outputShapes, outputDTypes: arguments of the call

For R positions the second number of each grid and the first of each shape are R times as large.
Rows are in the order of "token_ids", with any row in a padded slot. "slot_of" says a token's place
in that order.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..head.clustered import ClusteredRows
from ..head.draw import Draws
from ..head.flash_head import FlashHead
from ..head.kernels import MetalSteps, unsupported_formats
from ..models.locate import HeadLocation

METADATA_KEY = "flash_head"
LOGITS = ("route", "select_words", "score", "expand")
TOKENS = ("route", "select", "score", "sample")


def export_plan(head: FlashHead, location: HeadLocation, path: Path) -> dict[str, mx.array]:
    """Writes the file, which scores as many clusters as ``head`` does, and returns its arrays."""
    clustered = head.clustered.in_rows()
    forms = unsupported_formats(clustered)
    if forms:
        raise ValueError(
            f"The Metal kernels do not read {' and '.join(forms.values())} rows: export a model "
            "whose head has 4, 5, 6, 8, 16 or 32 bits."
        )
    arrays, launches = record(clustered, location.hidden_dtype, head.unverified_probes)
    rows = {
        name: {"shape": [clustered.vocab_size, *array.shape[2:]], "dtype": _value(array.dtype)}
        for name, array in clustered.rows.arrays().items()
    }
    plan = {
        "head": location.path,
        "dtype": _value(location.hidden_dtype),
        "hiddenSize": clustered.hidden_size,
        "rows": rows,
        "limit": clustered.n_clusters // head.unverified_probes,
        "logits": [f"flash_head_{step}" for step in LOGITS],
        "tokens": [f"flash_head_{step}" for step in TOKENS],
        "launches": launches,
    }
    mx.save_safetensors(str(path), arrays, {METADATA_KEY: json.dumps(plan)})
    return arrays


def record(
    clustered: ClusteredRows, dtype: mx.Dtype, n_probes: int
) -> tuple[dict[str, mx.array], dict[str, dict[str, Any]]]:
    """The arrays that the launches read, but for rows and a call's own, and the launches."""
    of_call = {
        "hidden": mx.zeros((1, clustered.hidden_size), dtype),
        "settings": mx.zeros((1, 3)),
        "top_k": mx.zeros((1,), mx.uint32),
        "keys": mx.zeros((1, 2), mx.uint32),
    }
    rows = {f"rows_{name}": array for name, array in clustered.rows.arrays().items()}
    centroids = clustered.centroids.matrix.arrays()
    known = of_call | rows | {f"centroids_{name}": array for name, array in centroids.items()}
    made: set[str] = set()
    launches: dict[str, dict[str, Any]] = {}

    def name_of(array: mx.array, input_name: str) -> str:
        """Its name, for a new array that of the kernel's input."""
        for name, other in known.items():
            if other is array:
                return name
        known[input_name] = array
        return input_name

    def kernel(**texts: Any) -> Callable[..., list[mx.array]]:
        """In place of ``mx.fast.metal_kernel``: writes the launches down and runs nothing."""

        def launch(**call: Any) -> list[mx.array]:
            shapes, dtypes = call["output_shapes"], call["output_dtypes"]
            launches[texts["name"]] = {
                "name": texts["name"],
                "inputNames": texts["input_names"],
                "outputNames": texts["output_names"],
                "source": texts["source"],
                "header": texts["header"],
                "arrays": list(map(name_of, call["inputs"], texts["input_names"])),
                "template": [{"name": k, "value": _value(item)} for k, item in call["template"]],
                "grid": list(call["grid"]),
                "threadGroup": list(call["threadgroup"]),
                "outputShapes": [list(shape) for shape in shapes],
                "outputDTypes": [_value(dtype) for dtype in dtypes],
            }
            results = [mx.zeros(*each) for each in zip(shapes, dtypes, strict=True)]
            known.update(zip(texts["output_names"], results, strict=True))
            made.update(texts["output_names"])
            return results

        return launch

    steps = MetalSteps(clustered, kernel)
    hidden = of_call["hidden"]
    draws = Draws(of_call["settings"], of_call["top_k"], of_call["keys"])
    scores = steps.route(hidden)
    selection = steps.select(scores, n_probes)
    steps.expand(scores, selection, steps.score(hidden, selection))
    selection = steps.select(scores, n_probes, words=False)
    candidates, unscored = steps.score(hidden, selection), steps.unscored(scores, selection)
    steps.choose(selection, candidates, unscored, draws)
    left_out = {*of_call, *rows, *made}
    return {name: array for name, array in known.items() if name not in left_out}, launches


def _value(item: int | bool | mx.Dtype) -> int | bool | str:
    """A template argument in JSON: a number, true or false, or the name of a dtype."""
    return str(item).removeprefix("mlx.core.") if isinstance(item, mx.Dtype) else item
