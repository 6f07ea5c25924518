"""From rows and hidden states to an index: clusters, centroids, probes and a measured report.

Knows arrays only: no model.
"""

import mlx.core as mx
import numpy as np

from ..head.centroids import Centroids
from ..head.matrix import Matrix, as_float32
from ..index.files import FlashHeadIndex
from ..index.settings import FlashHeadConfig
from .clustering import cluster_rows
from .fitting import fit_centroids
from .measures import USUAL_PROBES, Routing, measure
from .metric import logit_metric
from .probes import choose_probes, probes_needed

# Held-out positions choose the probes, and few of them choose badly: none of 300 may miss for 99 %
# to be shown. With 2,000 positions of SmolLM2-135M, in four draws, 300 chose 272 to 672 probes, 667
# chose 104 to 432, and the centroids fitted on the rest were equally good.
HELD_OUT_SHARE, HELD_OUT_SHARE_OF_FEW = 0.15, 1 / 3
HELD_OUT_ENOUGH = 1000  # above which the larger share holds out no more
CENTROID_GROUP = 64  # columns that share a scale


def build_index(
    rows: Matrix,
    states: np.ndarray | None = None,
    next_ids: np.ndarray | None = None,
    *,
    cluster_size: int = 16,
    n_probes: int | None = None,
    target_agreement: float = 0.99,
    eos_token_ids: tuple[int, ...] = (),
    source: str = "none",
    seed: int = 0,
    recipe: dict | None = None,
    progress: bool = True,
) -> FlashHeadIndex:
    """Builds the index of a head.

    The last states, ``n_held_out`` of them, are not fitted on: they choose the probes and make the
    report.

    Args:
        rows: The head's rows in token order, as the checkpoint stores them.
        states: (N, D) float32 calibration states, or None.
        next_ids: (N,) the token that followed each state; needed with states.
        cluster_size: Tokens per cluster.
        n_probes: Clusters scored per token, or None to choose.
        target_agreement: Agreement to reach on the held-out states, 0 … 1.
        eos_token_ids: Tokens whose clusters are always scored.
        source: What the states came from: "self", "file" or "none".
        seed: Of the clustering.
        recipe: How the checkpoint is made, to be stored.
        progress: Show bars and what was chosen.

    Raises:
        ValueError: If an argument is not valid.
    """
    if states is not None and len(states) < 2:
        raise ValueError(
            f"{len(states)} calibration positions are too few, since some are held out: "
            "give hundreds, or none."
        )
    weight = as_float32(rows.dequantized())
    head_bias = None if rows.bias is None else as_float32(rows.bias)
    held_out_count = 0 if states is None else n_held_out(len(states))
    fitted_on = None if states is None else states[:-held_out_count]
    token_ids = cluster_rows(
        weight,
        cluster_size,
        seed=seed,
        spherical=states is None,
        metric=None if states is None else logit_metric(fitted_on, rows.hidden_size),
        progress=progress,
    )
    n_clusters = len(token_ids)
    centroids = fit_centroids(
        weight,
        token_ids,
        fitted_on,
        head_bias=head_bias,
        group_size=CENTROID_GROUP,
        progress=progress,
    )
    said = []
    matrix = centroids.matrix
    if matrix.group_size != CENTROID_GROUP:
        instead = (
            f"are quantized in groups of {matrix.group_size}"
            if matrix.quantized
            else f"stay at {matrix.format.bits} bits"
        )
        said.append(
            f"The width {rows.hidden_size} is no multiple of {CENTROID_GROUP}: "
            f"the centroids {instead}."
        )
    report = {}
    if states is None:
        n_probes = uncalibrated_probes(n_clusters) if n_probes is None else n_probes
        said.append(f"{n_probes} of {n_clusters} clusters per token, not calibrated")
    else:
        held_out = states[-held_out_count:]
        needed = probes_needed(centroids, weight, token_ids, held_out, head_bias)
        if n_probes is None:
            n_probes = choose_probes(needed, n_clusters, target_agreement)
        report = _report(
            rows, weight, head_bias, token_ids, centroids, n_probes, held_out,
            next_ids[-held_out_count:],
        )  # fmt: skip
        p50, p90, p99 = np.percentile(needed, (50, 90, 99), method="inverted_cdf")
        report["probes_needed"] = {"p50": int(p50), "p90": int(p90), "p99": int(p99)}
        said.append(
            f"{n_probes} of {n_clusters} clusters per token: {report['agreement']:.2%} agreement "
            f"with the dense head on {held_out_count:,} held-out positions"
        )
    if progress:
        print("\n".join(said))
    config = FlashHeadConfig(
        n_clusters=n_clusters,
        cluster_size=cluster_size,
        n_probes=n_probes,
        fingerprint=rows.fingerprint(),
        eos_token_ids=tuple(sorted(i for i in eos_token_ids if i < rows.n_rows)),
        centroid_bits=matrix.format.bits,
        centroid_group_size=matrix.group_size or 0,
        calibration={
            "source": source,
            "positions": 0 if states is None else len(states),
            "seed": seed,
        },
        report=report,
        recipe=recipe or {},
    )
    return FlashHeadIndex(config, token_ids, centroids)


def n_held_out(n_positions: int) -> int:
    """How many of N calibration positions are not fitted on: a third of them, up to 1,000, and from
    about 6,700 positions on 15 %."""
    share, of_few = HELD_OUT_SHARE * n_positions, HELD_OUT_SHARE_OF_FEW * n_positions
    return max(1, round(max(share, min(of_few, HELD_OUT_ENOUGH))))


def _report(
    rows: Matrix,
    weight: np.ndarray,
    head_bias: np.ndarray | None,
    token_ids: np.ndarray,
    centroids: Centroids,
    n_probes: int,
    states: np.ndarray,
    next_ids: np.ndarray,
) -> dict:
    """What is measured on held-out states, at the chosen and at the usual numbers of probes.

    Returns:
        JSON-ready; a perplexity too large for a float is None.
    """
    n_clusters, cluster_size = token_ids.shape
    matrix, bias = np.array(centroids.matrix.dequantized(mx.float32)), np.array(centroids.bias)
    routing = Routing("FlashHead", lambda h: h @ matrix.T + bias, np.array(centroids.tail_offset))
    around = (max(1, n_probes // 2), n_probes, 2 * n_probes)
    counts = sorted({p for p in (*around, *USUAL_PROBES) if p <= n_clusters})
    measured, dense_perplexity = measure(
        states,
        lambda h: h @ weight.T + (0.0 if head_bias is None else head_bias),
        token_ids,
        [routing],
        counts,
        next_ids,
        progress=False,
    )
    dense_bytes = rows.nbytes
    by_probes = []
    for found in measured:
        n_bytes = centroids.routing_bytes + dense_bytes / rows.n_rows * (
            found.n_probes * cluster_size
        )
        by_probes.append(
            {
                "n_probes": found.n_probes,
                "agreement": found.agreement,
                "coverage": found.coverage,
                "perplexity_ratio": _finite(found.perplexity / dense_perplexity),
                "bytes_per_token": round(n_bytes),
                "bytes_share": n_bytes / dense_bytes,
            }
        )
    chosen = by_probes[counts.index(n_probes)]
    return {
        "positions": len(states),
        "agreement": chosen["agreement"],
        "coverage": chosen["coverage"],
        "dense_perplexity": _finite(dense_perplexity),
        "dense_bytes": dense_bytes,
        "by_probes": by_probes,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def uncalibrated_probes(n_clusters: int) -> int:
    """A sixth of the clusters: what plain means need for 99 % agreement on SmolLM2-135M."""
    return max(1, round(n_clusters / 6))
