"""From rows and hidden states to an index: clusters, centroids, probes and a measured report."""

import numpy as np

from ..head.matrix import Matrix, as_float32
from ..index.files import FlashHeadIndex
from ..index.settings import FlashHeadConfig
from ..index.sketch import Sketch
from .clustering import PASSES, cluster_rows
from .differences import StepBytes, lossless_settings
from .fitting import fit_centroids
from .measures import Routing, measure_positions
from .metric import logit_metric
from .probes import Goals, choose_probes, probe_grid
from .report import make_report
from .steps import Steps, stepwise

DEFAULT_GOALS = Goals()
HELD_OUT_SHARE = 1 / 4  # of the positions
UNCALIBRATED_SHARE = 1 / 6  # of the clusters; means need it for 99 % agreement on SmolLM2-135M


@stepwise
def build_index(
    rows: Matrix,
    states: np.ndarray | None = None,
    next_ids: np.ndarray | None = None,
    *,
    cluster_size: int = 16,
    n_probes: int | None = None,
    goals: Goals = DEFAULT_GOALS,
    eos_token_ids: tuple[int, ...] = (),
    calibration: dict | None = None,
    passes: int = PASSES,
    seed: int = 0,
    body_bytes: int = 0,
    recipe: dict | None = None,
) -> Steps[FlashHeadIndex]:
    """Builds the index of a head from its rows in token order, as the checkpoint stores them.

    The last quarter of the positions is held out: it chooses the probes and makes the report.

    Args:
        states: (N, D) float32 hidden states to calibrate on; None: no calibration.
        next_ids: (N,) the token after each of them; None: the report lacks what they say.
        n_probes: Clusters scored per token, or None to choose.
        goals: Goals for the held-out positions.
        eos_token_ids: Tokens whose clusters are always scored.
        calibration: What the settings say of the positions.
        passes: Dense passes of the clustering.
        body_bytes: Bytes of weights that all other layers read per token.

    Raises:
        ValueError: If an argument is not valid.
    """
    n_positions = 0 if states is None else len(states)
    n_fitted = n_positions - max(round(HELD_OUT_SHARE * n_positions), 1)
    if states is not None and n_fitted < 1:
        raise ValueError(
            f"{n_positions} calibration positions are too few, since some are held out: "
            "give hundreds, or none."
        )
    fitted_on = None if states is None else states[:n_fitted]
    weight = as_float32(rows.dequantized())
    head_bias = None if rows.bias is None else as_float32(rows.bias)
    token_ids = yield from cluster_rows.steps(
        weight,
        cluster_size,
        seed=seed,
        metric=None if fitted_on is None else logit_metric(fitted_on, rows.hidden_size),
        passes=passes,
    )
    n_clusters = len(token_ids)
    centroids = yield from fit_centroids.steps(weight, token_ids, fitted_on, head_bias=head_bias)
    report: dict = {}
    lossless: dict = {}
    if states is None:
        n_probes = n_probes or max(1, round(n_clusters * UNCALIBRATED_SHARE))
    else:
        nbytes = StepBytes(
            centroids=centroids.routing_bytes,
            probe=rows.nbytes / rows.n_rows * cluster_size,
            dense=rows.nbytes,
            body=body_bytes,
        )
        largest = int((goals.bytes_share * nbytes.dense - nbytes.centroids) / nbytes.probe)
        given = () if n_probes is None else (n_probes,)
        matrix, bias = as_float32(centroids.matrix.dequantized()), as_float32(centroids.bias)
        found = yield from measure_positions.steps(
            states[n_fitted:],
            lambda h: h @ weight.T + (0.0 if head_bias is None else head_bias),
            token_ids,
            Routing(lambda h: h @ matrix.T + bias, as_float32(centroids.tail_offset)),
            sorted({*probe_grid(n_clusters, max(largest, 1)), *given}),
            None if next_ids is None else next_ids[n_fitted:],
        )
        lossless = lossless_settings(found, nbytes, n_probes)
        choice = {}
        if n_probes is None:
            n_probes, choice["choice"] = choose_probes(
                found, goals, lambda n: nbytes.head(n) / nbytes.dense, n_clusters
            )
        report = make_report(found, n_probes, lossless["n_probes"], nbytes) | choice
    config = FlashHeadConfig(
        vocab_size=rows.n_rows,
        n_clusters=n_clusters,
        cluster_size=cluster_size,
        n_probes=n_probes,
        fingerprint=rows.fingerprint,
        eos_token_ids=tuple(sorted(i for i in eos_token_ids if i < rows.n_rows)),
        centroid_bits=centroids.matrix.format.bits,
        centroid_group_size=centroids.matrix.group_size,
        calibration=(calibration or {}) | {"positions": n_positions, "seed": seed},
        report=report,
        lossless=lossless,
        recipe=recipe or {},
    )
    return FlashHeadIndex(config, token_ids, centroids, Sketch.of(rows))
