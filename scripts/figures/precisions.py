"""One FlashHead under rows of other precisions: the table of docs/quality.md.

    python scripts/figures/precisions.py --model models/smollm2 --flash-head smollm2-flashhead \
        --text tests/data/heldout.txt

The hidden states are those of the model as it is. Only the rows of its head change: to 16 bits, to
fewer bits, and by noise, as a further training changes them. Each form of the rows is compared with
the head in 16 bits, dense, and with FlashHead against the dense head of the same rows.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flashhead.common.arguments import Parser, whole_number
from mlx_flashhead.common.command import check_writable, command
from mlx_flashhead.common.tables import new_table, percent, show
from mlx_flashhead.conversion import take_all
from mlx_flashhead.conversion.calibration import read_text, text_states
from mlx_flashhead.conversion.measures import measure_positions
from mlx_flashhead.head.matrix import Matrix, as_float32
from mlx_flashhead.index.files import FlashHeadIndex, read_index
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.fetch import resolve
from mlx_flashhead.models.locate import find_head

FORMS = {
    "bfloat16": {},
    "8 bits": {"bits": 8, "group_size": 64},
    "6 bits": {"bits": 6, "group_size": 64},
    "4 bits": {"bits": 4, "group_size": 64},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "3 bits": {"bits": 3, "group_size": 64},
}
NOISE = (0.1, 0.2, 0.3)  # of the rows' standard deviation
CHUNK_LOGITS = 1 << 23  # at once, which bounds memory


def forms(rows: Matrix) -> Iterator[tuple[str, Matrix]]:
    """The rows in every form, those of 16 bits first."""
    sixteen = Matrix(rows.weight.astype(mx.bfloat16), bias=rows.bias)
    for name, form in FORMS.items():
        yield name, sixteen.quantize(**form) if form else sixteen
    rng = np.random.default_rng(0)
    weight = as_float32(rows.weight)
    for share in NOISE:
        noisy = weight + share * weight.std() * rng.standard_normal(weight.shape, np.float32)
        yield f"noise {share}", Matrix(mx.array(noisy).astype(mx.bfloat16), bias=rows.bias)


class Logits:
    """The dense head of rows: states (N, D) → logits (N, V), float32."""

    def __init__(self, rows: Matrix):
        self.weight = as_float32(rows.dequantized())
        self.bias = 0.0 if rows.bias is None else as_float32(rows.bias)

    def __call__(self, states: np.ndarray) -> np.ndarray:
        return states @ self.weight.T + self.bias


def difference(states: np.ndarray, exact: Logits, rounded: Logits) -> dict[str, float]:
    """Agreement and KL of one dense head with another."""
    agreement = kl = 0.0
    size = max(1, CHUNK_LOGITS // len(exact.weight))
    for start in range(0, len(states), size):
        part = states[start : start + size]
        log_p, log_q = log_softmax(exact(part)), log_softmax(rounded(part))
        agreement += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum()
        kl += (np.exp(log_p) * (log_p - log_q)).sum()
    return {"dense_agreement": float(agreement) / len(states), "dense_kl": float(kl) / len(states)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def under(
    index: FlashHeadIndex, logits: Logits, states: np.ndarray, next_ids: np.ndarray
) -> dict[str, float]:
    """Agreement, KL and relative perplexity of the FlashHead with the dense head of these rows."""
    centroids = index.centroids
    matrix = as_float32(centroids.matrix.dequantized())
    offset = as_float32(centroids.bias)
    positions = take_all(
        measure_positions(
            states,
            logits,
            index.token_ids,
            lambda h: h @ matrix.T + offset,
            as_float32(centroids.tail_offset),
            [index.config.n_probes],
            next_ids,
        ),
        progress=False,
    )
    (means,) = positions.means()
    return {
        "agreement": means.agreement,
        "kl": means.kl,
        "perplexity": means.perplexity / positions.dense_perplexity(),
    }


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/precisions.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Folder or repository, in 16 bits or more.")
    parser.add_argument("--flash-head", required=True, metavar="FOLDER", help="Its FlashHead.")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on.")
    parser.add_argument("--positions", type=whole_number(1), help="Of the text (default: all).")
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
    args = parser.parse_args()
    if args.json:
        check_writable("--json", args.json)
    text, index = read_text(args.text), read_index(Path(args.flash_head))
    model, tokenizer, _ = load_dense(resolve(args.model))
    location = find_head(model)
    rows = location.rows()
    if rows.quantized:
        raise ValueError(f"{args.model} is quantized: give the model in 16 bits or more.")
    states, next_ids = take_all(
        text_states(model, tokenizer, location, text, positions=args.positions)
    )
    table = new_table(
        f"{Path(args.model).name}, {len(states):,} positions, {index.config.n_probes:,} of "
        f"{index.config.n_clusters:,} clusters",
        ("rows", "cosine", "dense", "KL", "FlashHead", "KL", "perplexity"),
    )
    exact, results = None, []
    for name, form in forms(rows):
        logits = Logits(form)
        exact = exact or logits
        result = {"rows": name, "cosine": index.sketch.likeness(form).cosine}
        result |= difference(states, exact, logits) | under(index, logits, states, next_ids)
        results.append(result)
        cosine, dense_agreement, dense_kl, agreement, kl, perplexity = list(result.values())[1:]
        table.add_row(
            name,
            f"{cosine:.4f}",
            percent(dense_agreement),
            f"{dense_kl:.4f}",
            percent(agreement),
            f"{kl:.4f}",
            f"{perplexity:.4f}",
        )
        print(f"{name}: measured", file=sys.stderr)
    show(table)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
