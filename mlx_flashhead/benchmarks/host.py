"""The host's time per token: what FlashHead adds to it.

The kernels are recorded, as MLX does for an exported function, and not run. So this can be measured
on any machine. Their replay alone is what MLX itself takes for its graph; the rest is FlashHead's.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from ..common.timing import Spread, turns
from ..head.flash_head import FlashHead
from ..head.kernels import MetalSteps
from ..models.compat.replaced import replaced

CALLS = 200  # of a run; its time is their median, since other processes take turns with this one
DENSE, LOGITS, TOKEN = "dense", "FlashHead full logits", "FlashHead token"
GRAPH = "MLX's own graph of {}"
ADDED = "added by {}"

Kernel = tuple[Callable[..., Any], dict[str, Any]]  # a kernel, and the arguments of a call


def host_benchmark(head: FlashHead, states: mx.array, *, rounds: int = 20) -> dict:
    """Times the host's part of a decoding step, all forms in turns.

    Args:
        head: A head on any path; its rows and settings are taken.
        states: (N, D) hidden states, of which the first is used.
        rounds: Runs that count, each of 200 calls.

    Returns:
        Microseconds by form, JSON-ready.
    """
    clustered = head.clustered.in_rows()
    mx.eval(clustered.rows.arrays())
    plain = head.copy(MetalSteps(clustered))
    recording, calls = _recording(plain)
    rows = clustered.flat_rows()
    mx.eval(rows.arrays())
    seconds: dict[str, list[float]] = {}

    def measure(hidden: mx.array) -> mx.array:
        runs: dict[str, Callable[[], object]] = {DENSE: lambda: rows.matmul(hidden)}
        for name, form in ((LOGITS, FlashHead.__call__), (TOKEN, FlashHead.token)):
            calls.clear()
            form(recording, hidden)
            runs[name] = partial(_in_settings, plain, form, hidden)
            runs[GRAPH.format(name)] = partial(_replay, tuple(calls), hidden)
        seconds.update({name: [] for name in runs})
        for number, name in turns(runs, rounds):
            taken = _median_seconds(runs[name])
            if number:
                seconds[name].append(taken)
        return plain(hidden)

    mx.export_function(lambda _: None, measure, states[:1][None])
    for name in (LOGITS, TOKEN):
        pairs = zip(seconds[name], seconds[GRAPH.format(name)], strict=True)
        seconds[ADDED.format(name)] = [whole - own for whole, own in pairs]
    return {
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "n_clusters": head.n_clusters,
        "n_probes": head.n_probes,
        "us": {name: Spread.of(taken).scaled(1e6).to_dict() for name, taken in seconds.items()},
    }


def _median_seconds(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(CALLS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _recording(head: FlashHead) -> tuple[FlashHead, list[Kernel]]:
    """The head on the kernels' path, and a list of the kernels that it calls from then on."""
    calls: list[Kernel] = []

    make: Any = mx.fast.metal_kernel

    def make_recorded(**arguments: Any) -> Callable:
        kernel = make(**arguments)

        def call(**given: Any) -> Any:
            calls.append((kernel, given))
            return kernel(**given)

        return call

    with replaced(mx.fast, metal_kernel=make_recorded):
        steps = MetalSteps(head.clustered)
    return head.copy(steps), calls


def _in_settings(head: FlashHead, form: Callable, hidden: mx.array) -> mx.array:
    """As a generated token has it: with the settings of its call."""
    with head.settings():
        return form(head, hidden)


def _replay(calls: tuple[Kernel, ...], hidden: mx.array) -> list[mx.array]:
    made = [hidden.reshape(-1, hidden.shape[-1])]
    for kernel, arguments in calls:
        made += kernel(**arguments)
    return [*made, made[-1].reshape(*hidden.shape[:-1], -1)]
