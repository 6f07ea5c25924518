"""From rows and hidden states to an index: clusters, centroids, probes and a measured report."""

import numpy as np

from ..head.centroids import Centroids
from ..head.matrix import Matrix, as_float32
from ..index.files import FlashHeadIndex
from ..index.settings import FlashHeadConfig
from ..index.sketch import Sketch
from .clustering import cluster_rows
from .fitting import fit_centroids
from .measures import Routing, measure_positions
from .metric import logit_metric
from .positions import Positions
from .probes import Goals, choose_probes, probe_grid
from .report import choice_text, make_report, report_lines

CENTROID_GROUP = 64  # columns that share a scale
DEFAULT_GOALS = Goals()


def build_index(
    rows: Matrix,
    positions: Positions | None = None,
    *,
    cluster_size: int = 16,
    n_probes: int | None = None,
    goals: Goals = DEFAULT_GOALS,
    eos_token_ids: tuple[int, ...] = (),
    source: str = "none",
    seed: int = 0,
    body_bytes: int | None = None,
    recipe: dict | None = None,
    progress: bool = True,
    tables: bool = True,
) -> FlashHeadIndex:
    """Builds the index of a head.

    The held-out positions are not fitted on. They choose the probes and make the report.

    Args:
        rows: The head's rows in token order, as the checkpoint stores them.
        positions: Positions to calibrate on, or None.
        cluster_size: Tokens per cluster.
        n_probes: Clusters scored per token, or None to choose.
        goals: Goals for the held-out positions.
        eos_token_ids: Tokens whose clusters are always scored.
        source: Source of the positions, by the names of `options.py`.
        seed: Seed of the clustering.
        body_bytes: Bytes of weights that all other layers read per token, for the report.
        recipe: The recipe to store.
        progress: Show bars and the choice.
        tables: Show the measured report too.

    Raises:
        ValueError: If an argument is not valid.
    """
    fitted_on = None
    if positions is not None:
        held_out, fitted_on = positions.parted()
        if not len(fitted_on) or not len(held_out):
            raise ValueError(
                f"{len(positions)} calibration positions are too few, since some are held out: "
                "give hundreds, or none."
            )
    weight = as_float32(rows.dequantized())
    head_bias = None if rows.bias is None else as_float32(rows.bias)
    token_ids = cluster_rows(
        weight,
        cluster_size,
        seed=seed,
        spherical=fitted_on is None,
        metric=None if fitted_on is None else logit_metric(fitted_on, rows.hidden_size),
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
    if tables and matrix.group_size != CENTROID_GROUP:
        instead = (
            f"are quantized in groups of {matrix.group_size}"
            if matrix.quantized
            else f"stay at {matrix.format.bits} bits"
        )
        said.append(
            f"The width {rows.hidden_size} is not a multiple of {CENTROID_GROUP}: "
            f"the centroids {instead}."
        )
    report: dict = {}
    if positions is None:
        n_probes = uncalibrated_probes(n_clusters) if n_probes is None else n_probes
        said.append(f"{n_probes:,} of {n_clusters:,} clusters per token, not calibrated")
    else:
        n_probes, report, chosen = _chosen(
            rows,
            weight,
            head_bias,
            token_ids,
            centroids,
            n_probes,
            goals,
            held_out,
            body_bytes,
            progress,
        )
        said += [*(report_lines(report, n_probes) if tables else []), *chosen]
    if progress:
        print("\n".join(said))
    config = FlashHeadConfig(
        vocab_size=rows.n_rows,
        n_clusters=n_clusters,
        cluster_size=cluster_size,
        n_probes=n_probes,
        fingerprint=rows.fingerprint,
        eos_token_ids=tuple(sorted(i for i in eos_token_ids if i < rows.n_rows)),
        centroid_bits=matrix.format.bits,
        centroid_group_size=matrix.group_size or 0,
        calibration={
            "source": source,
            "positions": 0 if positions is None else len(positions),
            "seed": seed,
        },
        report=report,
        recipe=recipe or {},
    )
    return FlashHeadIndex(config, token_ids, centroids, Sketch.of(rows))


def _chosen(
    rows: Matrix,
    weight: np.ndarray,
    head_bias: np.ndarray | None,
    token_ids: np.ndarray,
    centroids: Centroids,
    n_probes: int | None,
    goals: Goals,
    held_out: Positions,
    body_bytes: int | None,
    progress: bool,
) -> tuple[int, dict, list[str]]:
    """The number of probes, the report on the held-out positions, and a sentence on a choice."""
    n_clusters, cluster_size = token_ids.shape
    matrix, bias = as_float32(centroids.matrix.dequantized()), as_float32(centroids.bias)
    routing = Routing("FlashHead", lambda h: h @ matrix.T + bias, as_float32(centroids.tail_offset))
    dense_bytes = sum(array.nbytes for array in rows.arrays().values())
    stage_bytes, probe_bytes = centroids.routing_bytes, dense_bytes / rows.n_rows * cluster_size

    def bytes_share(n_probes: int) -> float:
        return (stage_bytes + n_probes * probe_bytes) / dense_bytes

    largest = int((goals.bytes_share * dense_bytes - stage_bytes) / probe_bytes)
    grid = probe_grid(n_clusters, max(largest, 1))
    given = () if n_probes is None else (n_probes, max(1, n_probes // 2))
    found = measure_positions(
        held_out.states,
        lambda h: h @ weight.T + (0.0 if head_bias is None else head_bias),
        token_ids,
        [routing],
        sorted({*grid, *given}),
        held_out.next_ids,
        progress=progress,
    )
    said = []
    if n_probes is None:
        choice = choose_probes(found, held_out.kinds, goals, bytes_share)
        n_probes = choice.n_probes
        said.append(choice_text(choice, n_clusters, goals))
    report = make_report(
        found,
        held_out,
        n_probes,
        stage_bytes=stage_bytes,
        probe_bytes=probe_bytes,
        dense_bytes=dense_bytes,
        body_bytes=body_bytes,
    )
    return n_probes, report, said


def uncalibrated_probes(n_clusters: int) -> int:
    """A sixth of the clusters. Plain means need this for 99 % agreement on SmolLM2-135M."""
    return max(1, round(n_clusters / 6))
