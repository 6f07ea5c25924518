"""Measures speed and memory: of a head, a model, a conversion, servers; or estimates them."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from .benchmarks import estimate
from .benchmarks.conversion import convert_benchmark, index_benchmark
from .benchmarks.draft import draft_benchmark
from .benchmarks.drawing import draw
from .benchmarks.first_use import first_use_benchmark
from .benchmarks.head import CLUSTER_SIZE, head_benchmark, random_head
from .benchmarks.host import host_benchmark
from .benchmarks.machine import machine
from .benchmarks.memory import head_memory, model_memory
from .benchmarks.model import SAMPLERS, model_benchmark
from .benchmarks.options import (
    CONVERT,
    DRAFT,
    ESTIMATE,
    FIRST_USE,
    HEAD,
    HOST,
    MEMORY,
    MODEL,
    POSITIONS,
    SAMPLER,
    SERVER,
    make_parser,
)
from .benchmarks.output import print_result
from .benchmarks.positions import COUNTS, positions_benchmark
from .benchmarks.sampler import sampler_benchmark
from .benchmarks.server import server_benchmark
from .common.command import check_writable, command
from .common.pictures import check_picture
from .common.tables import check_tables
from .head.flash_head import FlashHead
from .loading.load import load
from .loading.look_up import look_up_options
from .models.fetch import resolve
from .models.install import dense_copy, installed_head

SAMPLER_WIDTH = 64  # of the random heads: a sampler reads the clusters, not the rows
REPORT = """\
Please send this to the project as an issue, with the template "Benchmark":

```json
{figures}
```"""


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.benchmark``."""
    args = make_parser(__doc__).parse_args()
    check_tables("mlx_flashhead.benchmark")
    if args.kind == ESTIMATE:
        estimate.run(args)
        return
    if args.json:
        check_writable("--json", args.json)
    if args.plot:
        check_picture("--plot", args.plot)
    measure = {
        HEAD: _head,
        POSITIONS: _positions,
        MODEL: _model,
        CONVERT: _convert,
        FIRST_USE: _first_use,
        SAMPLER: _sampler,
        DRAFT: _draft,
        HOST: _host,
        MEMORY: _memory,
        SERVER: _server,
    }
    found = measure[args.kind](args)
    result = {
        "kind": args.kind,
        "machine": machine(),
        "command": " ".join(["mlx_flashhead.benchmark", *sys.argv[1:]]),
        "results": found,
    }
    print_result(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        draw(result, args.plot)
    if args.report:
        print(REPORT.format(figures=json.dumps(result, indent=1)))


def _head(args: argparse.Namespace) -> list[dict]:
    return [
        {"name": name}
        | head_benchmark(
            head,
            _states(head, dtype),
            n_positions=args.positions,
            rounds=args.rounds,
            description=f"Timing {name}",
        )
        for name, head, dtype in _heads(args)
    ]


def _positions(args: argparse.Namespace) -> list[dict]:
    return [
        {"name": name}
        | positions_benchmark(
            head,
            _states(head, dtype),
            counts=args.counts or COUNTS,
            rounds=args.rounds,
            description=f"Timing positions of {name}",
        )
        for name, head, dtype in _heads(args)
    ]


def _host(args: argparse.Namespace) -> list[dict]:
    return [
        {"name": name} | host_benchmark(head, _states(head, dtype), rounds=args.rounds)
        for name, head, dtype in _heads(args)
    ]


def _memory(args: argparse.Namespace) -> list[dict]:
    if args.model is not None:
        return [{"name": Path(args.model).name} | model_memory(args.model)]
    name, (vocab_size, hidden_size) = args.shape
    found = head_memory(vocab_size, hidden_size, n_probes=_usual_probes(vocab_size))
    return [{"name": name} | one for one in found]


def _server(args: argparse.Namespace) -> list[dict]:
    options = ["--n-probes", str(args.n_probes)] if args.n_probes is not None else []
    options += ["--flash-head", args.flash_head] if args.flash_head is not None else []
    options += ["--no-build"] if args.no_build else []
    return [
        server_benchmark(
            resolve(args.model),
            options=options,
            clients=args.clients,
            requests=args.requests,
            tokens=args.tokens,
            rounds=args.rounds,
        )
    ]


def _heads(args: argparse.Namespace) -> Iterator[tuple[str, FlashHead, mx.Dtype]]:
    """Yields the heads of the command line: name, head, and the dtype of its hidden states."""
    if args.model is not None:
        model, _ = load(args.model, n_probes=args.n_probes, **look_up_options(args))
        head = installed_head(model)
        rows = head.clustered.rows
        values = rows.weight if rows.scales is None else rows.scales
        yield Path(args.model).name, head, values.dtype
        return
    for name, (vocab_size, hidden_size) in args.shape:
        dtype = getattr(mx, args.dtype)
        n_probes = args.n_probes or _usual_probes(vocab_size)
        yield (
            name,
            random_head(
                vocab_size, hidden_size, dtype=dtype, bits=args.head_bits, n_probes=n_probes
            ),
            dtype,
        )


def _states(head: FlashHead, dtype: mx.Dtype) -> mx.array:
    states = np.random.default_rng(0).normal(size=(64, head.hidden_size)).astype(np.float32)
    return mx.array(states).astype(dtype)


def _model(args: argparse.Namespace) -> list[dict]:
    flash, tokenizer = load(args.model, n_probes=args.n_probes, **look_up_options(args))
    head = installed_head(flash)
    measured = model_benchmark(
        dense_copy(flash),
        flash,
        tokenizer,
        samplers=args.sampler or tuple(SAMPLERS),
        batches=args.batch or (1, 4, 8),
        tokens=args.tokens,
        rounds=args.rounds,
    )
    about = {"model": Path(args.model).name, "n_probes": head.n_probes}
    about |= {"n_clusters": head.n_clusters, "backend": head.backend}
    about["backend_reason"] = head.backend_reason
    return [about | one for one in measured]


def _convert(args: argparse.Namespace) -> list[dict]:
    positions = args.calibration_positions
    if args.model is not None:
        return [convert_benchmark(args.model, calibration_positions=positions)]
    name, (vocab_size, hidden_size) = args.shape
    return [{"name": name} | index_benchmark(vocab_size, hidden_size, positions)]


def _first_use(args: argparse.Namespace) -> list[dict]:
    return [first_use_benchmark(args.model)]


def _draft(args: argparse.Namespace) -> list[dict]:
    target, tokenizer = load(args.model)
    draft, _ = load(args.draft_model)
    measured = draft_benchmark(
        target,
        draft,
        tokenizer,
        probes=args.probes,
        num_draft_tokens=args.num_draft_tokens,
        tokens=args.tokens,
        rounds=args.rounds,
    )
    about = {"model": Path(args.model).name, "draft_model": Path(args.draft_model).name}
    return [about | measured]


def _sampler(args: argparse.Namespace) -> list[dict]:
    if args.model is not None:
        model, _ = load(args.model, n_probes=args.n_probes, **look_up_options(args))
        heads = [(Path(args.model).name, installed_head(model))]
    else:
        heads = []
        for size in args.vocab_size or (128_256,):
            n_probes = args.n_probes or _usual_probes(size)
            heads.append(("random clusters", random_head(size, SAMPLER_WIDTH, n_probes=n_probes)))
    return [
        {"name": name} | sampler_benchmark(head, n_positions=args.positions, rounds=args.rounds)
        for name, head in heads
    ]


def _usual_probes(vocab_size: int) -> int:
    return min(256, -(-vocab_size // CLUSTER_SIZE))


if __name__ == "__main__":
    main()
