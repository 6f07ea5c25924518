"""A head as functions in a file that MLX reads from any language, Swift above all.

The file holds three functions of one hidden state. MLX finds a function by the names of its
arguments, so each names the state after itself:

    token        (1, D) → the greedy token (1,) uint32
    candidates   (1, D) → token ids (1, p, n) uint32, and their logits (1, p, n)
    logits       (1, D) → full logits (1, V)

The weights are in the file, or they are further arguments with the names of `head_weights`. With
the backend "metal" a function consists of FlashHead's kernels alone. It runs on the GPU, whatever
machine has written the file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.clustered import ClusteredRows
from ..head.flash_head import FlashHead
from ..head.kernels import MIN_PROBES, MetalSteps, unread
from ..head.portable import PortableSteps
from ..head.steps import Steps
from ..models.locate import find_head, recorded_hidden

TOKEN, CANDIDATES, LOGITS = "token", "candidates", "logits"
FUNCTIONS = (TOKEN, CANDIDATES, LOGITS)
METAL, PORTABLE = "metal", "mlx"
ONLY_FULL_LOGITS = ("slot_of",)  # weights of the function ``logits`` only


@dataclass(frozen=True)
class ExportedFunction:
    """One function of the file.

    Attributes:
        name: Name of the hidden state's argument.
        inputs: Arguments by name, with the shape and dtype of each.
        outputs: Shapes and dtypes of the results.
    """

    name: str
    inputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    outputs: list[tuple[tuple[int, ...], mx.Dtype]]


def head_weights(clustered: ClusteredRows) -> dict[str, mx.array]:
    """The functions' arguments besides the hidden state, by name.

    rows_* are the head's rows in the order of the clusters, as the model stores them. centroids_*
    are the centroids. route_bias (C,) is added to the clusters' scores, and tail_offset (C,) turns
    scores into estimates of a token's logit. token_ids (C, n) gives the token of each row, and
    slot_of (V,) the row of each token.
    """
    clustered, centroids = clustered.in_rows(), clustered.centroids
    return (
        {f"rows_{name}": array for name, array in clustered.rows.arrays().items()}
        | {f"centroids_{name}": array for name, array in centroids.matrix.arrays().items()}
        | {
            "route_bias": clustered.route_bias,
            "token_ids": clustered.token_ids,
            "slot_of": clustered.slot_of,
            "tail_offset": centroids.tail_offset.astype(mx.float32),
        }
    )


def head_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of the hidden states that enter the model's head. Nothing is evaluated."""
    with recorded_hidden(find_head(model)) as states:
        model(mx.array([[0]]))
    return states[-1].dtype


def export_head(
    head: FlashHead,
    path: Path,
    *,
    dtype: mx.Dtype,
    n_probes: int | None = None,
    backend: str = METAL,
    include_weights: bool = False,
) -> list[ExportedFunction]:
    """Writes the functions of ``head`` into a file.

    Args:
        head: The head.
        path: The file; an existing one is overwritten.
        dtype: Of the hidden states.
        n_probes: Clusters scored; default: as the head is set.
        backend: "metal" for FlashHead's kernels, "mlx" for plain operations of this machine's
            device.
        include_weights: Put the weights into the file. Otherwise they are arguments.

    Returns:
        The functions in the file.

    Raises:
        ValueError: If the kernels do not read this head, or ``n_probes`` is out of range.
    """
    settings = head.copy()
    settings.n_probes = head.n_probes if n_probes is None else n_probes
    if backend == METAL:
        _check_kernels(head.clustered, settings.n_probes)
    clustered = head.clustered.in_rows()
    weights = head_weights(clustered)
    mx.eval(weights)
    steps = _steps(clustered, backend, settings.n_probes)
    mx.eval(steps.arrays())

    def function(**arrays: mx.array) -> list[mx.array]:
        name = next(name for name in FUNCTIONS if name in arrays)
        hidden = arrays.pop(name)
        given = steps
        if not include_weights:
            rows = _with_weights(clustered, arrays)
            given = _steps(rows, backend, settings.n_probes)
        return _run(name, given, hidden, settings.n_probes)

    hidden = mx.zeros((1, clustered.hidden_size), dtype)
    functions = []
    with mx.exporter(str(path), function) as exporter:
        for name in FUNCTIONS:
            arguments = {name: hidden}
            if not include_weights:
                arguments |= {
                    key: array
                    for key, array in weights.items()
                    if name == LOGITS or key not in ONLY_FULL_LOGITS
                }
            exporter(**arguments)
            functions.append(_described(function, name, arguments))
    return functions


def _run(name: str, steps: Steps, hidden: mx.array, n_probes: int) -> list[mx.array]:
    scores = steps.route(hidden)
    selection = steps.select(scores, n_probes)
    candidates = steps.score(hidden, selection)
    if name == TOKEN:
        return [steps.token(selection, candidates)]
    if name == CANDIDATES:
        return [steps.token_ids(selection.probes), candidates.logits]
    return [steps.expand(scores, selection, candidates)]


def _steps(clustered: ClusteredRows, backend: str, n_probes: int) -> Steps:
    return MetalSteps(clustered, n_probes) if backend == METAL else PortableSteps(clustered)


def _check_kernels(clustered: ClusteredRows, n_probes: int) -> None:
    """Refuses what would not be kernels alone."""
    forms = unread(clustered)
    if forms:
        raise ValueError(
            f"The Metal kernels do not read {' and '.join(forms.values())} rows: export this head "
            "with the backend 'mlx'."
        )
    if n_probes < MIN_PROBES:
        raise ValueError(
            f"n_probes is {n_probes}, but functions of Metal kernels score {MIN_PROBES} clusters "
            "or more: choose more, or export this head with the backend 'mlx'."
        )


def _with_weights(clustered: ClusteredRows, weights: dict[str, mx.array]) -> ClusteredRows:
    """The same head on other arrays, given by the names of ``head_weights``."""

    def named(prefix: str) -> dict[str, mx.array]:
        return {k.removeprefix(prefix): a for k, a in weights.items() if k.startswith(prefix)}

    centroids = clustered.centroids
    own: dict[str, Any] = {
        key: array
        for key, array in weights.items()
        if key in ("route_bias", "token_ids", "slot_of")
    }
    return replace(
        clustered,
        rows=clustered.rows.with_arrays(named("rows_")),
        centroids=replace(
            centroids,
            matrix=centroids.matrix.with_arrays(named("centroids_")),
            tail_offset=weights.get("tail_offset", centroids.tail_offset),
        ),
        **own,
    )


def _described(function: Callable, name: str, arguments: dict[str, mx.array]) -> ExportedFunction:
    """The function's arguments and results, as MLX records them."""
    outputs: list[tuple[tuple[int, ...], mx.Dtype]] = []

    def record(entry: dict) -> None:
        if entry["type"] == "outputs":
            outputs.extend((tuple(shape), dtype) for _, shape, dtype in entry["outputs"])

    named: dict[str, Any] = dict(arguments)
    mx.export_function(record, function, **named)
    inputs = {key: (tuple(array.shape), array.dtype) for key, array in arguments.items()}
    return ExportedFunction(name, inputs, outputs)
