"""Makes the index of a model in short steps and writes nothing: a build may be dropped."""

import math
import timeit
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.matrix import Matrix, as_float32
from ..index.files import FlashHeadIndex, Sketch
from ..index.settings import FlashHeadConfig
from ..models.locate import HeadLocation
from . import Steps, measures
from .calibration import builtin_states, read_text, text_states
from .clusters import PASSES, QUICK_PASSES, cluster_rows, fit_centroids, logit_metric
from .options import BUILTIN, MIN_POSITIONS, NO_CALIBRATION, IndexOptions

STEP_SECONDS = 0.1  # of the device, where a window of text takes no longer
HELD_OUT_SHARE = 1 / 4  # of the positions
UNCALIBRATED_SHARE = 1 / 6  # of the clusters; means need it for 99 % agreement on SmolLM2-135M

# Passes over all centroids for each dense pass of the clustering, and over all rows for each
# position, that take as long as clustering, fitting and measuring.
CLUSTER_PASSES, POSITION_PASSES = 0.5, 6
SPEED_SAMPLE = 1024  # rows and columns of the product that measures the machine's speed


def model_index(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    options: IndexOptions,
    *,
    drafted: Steps[np.ndarray] | None = None,
    original: Matrix | None = None,
    step_seconds: float = math.inf,
) -> Steps[FlashHeadIndex]:
    """The index of a dense model. Between two steps the model is as it was, and may write text.

    It calibrates on states ``drafted`` by a drafter, or as the options say. The model works for
    about ``step_seconds`` at once. ``original`` are the rows before they were quantized. ValueError
    at a step, if an option is not valid.
    """
    states = next_ids = None
    calibration = {"source": options.source} | ({"quick": True} if options.quick else {})
    limits: dict[str, Any] = {"positions": options.positions, "step_seconds": step_seconds}
    if drafted is not None:
        states = yield from drafted
        calibration["source"] = "drafts"
    elif options.source == BUILTIN:
        limits["seconds"] = options.calibration_seconds
        read = yield from builtin_states(model, tokenizer, location, **limits)
        states, next_ids, cut_short = read
        calibration |= {"cut_short": True} if cut_short else {}
    elif options.source != NO_CALIBRATION:
        text = read_text(options.calibration)
        states, next_ids = yield from text_states(model, tokenizer, location, text, **limits)
    # a token reads all weights but those of the head, and one row of the embeddings
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    layers = (layer for layer in model.modules() if layer is not location.module)
    arrays = (layer.values() for layer in layers if not isinstance(layer, embeddings))
    body_bytes = sum(a.nbytes for each in arrays for a in each if isinstance(a, mx.array))
    about = {"eos_token_ids": tokenizer.eos_token_ids, "calibration": calibration}
    about |= {"original": original, "body_bytes": body_bytes}
    return (yield from build_index(location.rows(), options, states, next_ids, **about))


def build_index(
    rows: Matrix,
    options: IndexOptions,
    states: np.ndarray | None = None,
    next_ids: np.ndarray | None = None,
    *,
    eos_token_ids: Iterable[int] = (),
    calibration: dict[str, Any] | None = None,
    original: Matrix | None = None,
    body_bytes: int = 0,
) -> Steps[FlashHeadIndex]:
    """Builds the index of a head from its rows in token order, as the checkpoint stores them.

    ``states`` (N, D) float32 calibrate it. With the tokens after them, ``next_ids`` (N,), the last
    quarter chooses the probes and makes the report, which compares the rows with the ``original``
    ones. ``body_bytes`` are those of all other layers. ValueError if the states are too few or not
    finite.
    """
    n_positions = 0 if states is None else len(states)
    n_fitted = n_positions - (0 if next_ids is None else round(HELD_OUT_SHARE * n_positions))
    fitted_on = metric = None
    if states is not None:
        if n_positions < MIN_POSITIONS:
            raise ValueError(
                f"{n_positions} calibration positions are too few: give hundreds, or none."
            )
        if not np.isfinite(states).all():
            raise ValueError("The calibration states hold NaN or infinity: check the model.")
        fitted_on = states[:n_fitted]
        metric = logit_metric(fitted_on)
    weight = as_float32(rows.dequantized())
    head_bias = None if rows.bias is None else as_float32(rows.bias)
    passes = QUICK_PASSES if options.quick else PASSES
    how: dict[str, Any] = {"seed": options.seed, "metric": metric, "passes": passes}
    token_ids = yield from cluster_rows(weight, options.cluster_size, **how)
    centroids = yield from fit_centroids(weight, token_ids, fitted_on, head_bias=head_bias)
    n_clusters = len(token_ids)
    n_probes = unverified_probes = options.n_probes
    report: dict[str, Any] = {}
    verification: dict[str, Any] = {}
    if states is None or next_ids is None:
        n_probes = n_probes or max(1, round(n_clusters * UNCALIBRATED_SHARE))
    else:
        probe = rows.nbytes / rows.n_rows * options.cluster_size
        nbytes = measures.StepBytes(centroids.routing_bytes, probe, rows.nbytes, body_bytes)
        largest = int((measures.MAX_BYTES * nbytes.dense - nbytes.centroids) / nbytes.probe)
        counts = {*measures.probe_grid(n_clusters, max(largest, 1)), *filter(None, (n_probes,))}
        matrix, bias = as_float32(centroids.matrix.dequantized()), as_float32(centroids.bias)
        held_out = states[n_fitted:], next_ids[n_fitted:]
        measured = yield from measures.measure_positions(
            held_out[0],
            lambda h: h @ weight.T + (0.0 if head_bias is None else head_bias),
            token_ids,
            lambda h: h @ matrix.T + bias,
            as_float32(centroids.tail_offset),
            sorted(counts),
            held_out[1],
        )
        if n_probes is None:
            n_probes = measures.choose_verified(measured, nbytes)
            agreement = options.target_agreement
            unverified_probes = measures.choose_unverified(measured, agreement, nbytes)
        verification = measures.verification_settings(measured, n_probes)
        report = measures.make_report(measured, n_probes, nbytes)
        if original is not None and rows.quantized and not original.quantized:
            heads = (original, rows, *held_out)
            compared = measures.compare_bits(measured, n_probes, nbytes, *heads)
            report["head_bits"] = yield from compared
    config = FlashHeadConfig(
        vocab_size=rows.n_rows,
        n_clusters=n_clusters,
        cluster_size=options.cluster_size,
        n_probes=n_probes,
        unverified_probes=unverified_probes or n_probes,
        fingerprint=rows.fingerprint,
        eos_token_ids=tuple(sorted(int(i) for i in eos_token_ids if i in range(rows.n_rows))),
        centroid_bits=centroids.matrix.format.bits,
        centroid_group_size=centroids.matrix.group_size,
        calibration=(calibration or {}) | {"positions": n_positions, "seed": options.seed},
        report=report,
        verification=verification,
    )
    return FlashHeadIndex(config, token_ids, centroids, Sketch.of(rows))


def index_nbytes(rows: Matrix) -> int:
    """Approximate size of an index, from what is known before the work."""
    return rows.n_rows * (4 + rows.hidden_size // 16)  # ids, centroids of 4 bits and small arrays


def expected_seconds(rows: Matrix, options: IndexOptions) -> float:
    """The approximate greatest time of an index: the time limit of the text, and the products."""
    matrix = np.ones((SPEED_SAMPLE, SPEED_SAMPLE), dtype=np.float32)
    seconds_of_sample = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=3))
    n_clusters = -(-rows.n_rows // options.cluster_size)
    passes = CLUSTER_PASSES * (QUICK_PASSES if options.quick else PASSES) * n_clusters
    reading = 0.0
    if options.source != NO_CALIBRATION:
        passes += POSITION_PASSES * options.positions
        reading = options.calibration_seconds
    products = rows.n_rows * rows.hidden_size * passes / SPEED_SAMPLE**3
    return reading + products * seconds_of_sample
