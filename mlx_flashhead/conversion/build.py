"""Makes the index of a model in short parts and writes nothing: a build may be dropped."""

import math
import timeit
from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.matrix import Matrix, as_float32
from ..index.flash_head_config import FlashHeadConfig, VerificationSettings
from ..index.flash_head_index import FlashHeadIndex, Sketch
from ..models.locate import HeadLocation
from . import Task
from .calibration import READING, builtin_states, read_text, text_states
from .centroids import fit_centroids, logit_metric
from .checkpoint import NOT_KEPT, Checkpoint, checksum
from .clusters import PASSES, QUICK_PASSES, cluster_rows
from .clusters import STAGE as CLUSTERING
from .measures import Product, measure_positions
from .options import BUILTIN, MIN_POSITIONS, NO_CALIBRATION, IndexOptions
from .probes import (
    BytesRead,
    choose_unverified,
    choose_verified,
    measured_probes,
    verification_settings,
)
from .report import compare_bits, make_report

# The model works about so long at once, where a window of text takes no longer.
STEP_SECONDS = 0.1
# The share of the positions that is held out.
HELD_OUT_SHARE = 1 / 4
# The share of the clusters that means need for 99 % agreement on SmolLM2-135M.
UNCALIBRATED_SHARE = 1 / 6

# Passes over all centroids for each dense pass of the clustering, and over all rows for each
# position, that take as long as clustering, fitting and measuring.
CLUSTER_PASSES = 0.5
POSITION_PASSES = {"Fitting": 3.6, "Rounding": 0.9, "Measuring": 1.5}
# The product that measures the machine's speed has so many rows and columns.
SPEED_SAMPLE = 1024


def model_index(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    options: IndexOptions,
    *,
    original: Matrix | None = None,
    step_seconds: float = math.inf,
    checkpoint: Checkpoint = NOT_KEPT,
) -> Task[FlashHeadIndex]:
    """Makes the index of a dense model.

    Between two parts the model is as it was, and may write text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        location: Its head.
        options: How the index is made, and what it is calibrated on.
        original: The rows before they were quantized.
        step_seconds: About how long the model works at once.
        checkpoint: Keeps what is computed until the index is there.

    Returns:
        The index.

    Raises:
        ValueError: In one of the parts, if an option is not valid.
    """
    states = None
    next_ids = None
    about: dict[str, Any] = {"source": options.source}
    if options.quick:
        about["quick"] = True
    if options.source == BUILTIN:
        states, next_ids, cut_short = yield from builtin_states(
            model,
            tokenizer,
            location,
            positions=options.positions,
            seconds=options.calibration_seconds,
            step_seconds=step_seconds,
            checkpoint=checkpoint,
        )
        if cut_short:
            about["cut_short"] = True
    elif options.source != NO_CALIBRATION:
        states, next_ids = yield from text_states(
            model,
            tokenizer,
            location,
            read_text(options.calibration),
            positions=options.positions,
            step_seconds=step_seconds,
        )
    return (
        yield from build_index(
            location.rows(),
            options,
            states,
            next_ids,
            eos_token_ids=tokenizer.eos_token_ids,
            calibration=about,
            original=original,
            body_bytes=_body_bytes(model, location),
            checkpoint=checkpoint,
        )
    )


def _body_bytes(model: nn.Module, location: HeadLocation) -> int:
    """The bytes that a token reads, but for the head: all weights, and one row of embeddings."""
    nbytes = 0
    for layer in model.modules():
        is_embedding = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)
        if layer is not location.module and not is_embedding:
            nbytes += sum(array.nbytes for array in layer.values() if isinstance(array, mx.array))
    return nbytes


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
    checkpoint: Checkpoint = NOT_KEPT,
) -> Task[FlashHeadIndex]:
    """Builds the index of a head from its rows.

    Args:
        rows: The rows (V, D) in token order, as the checkpoint stores them.
        options: How the index is made.
        states: Hidden states (N, D) float32 that calibrate it.
        next_ids: The tokens after them (N,). With them the last quarter chooses the probes and
            makes the report.
        eos_token_ids: Tokens that end a text.
        calibration: What is stored of the calibration.
        original: The rows before they were quantized, with which the report compares them.
        body_bytes: The bytes that a token reads of all other layers.
        checkpoint: Keeps what is computed until the index is there.

    Returns:
        The index.

    Raises:
        ValueError: If the states are too few or not finite.
    """
    weight = as_float32(rows.dequantized())
    bias = None
    if rows.bias is not None:
        bias = as_float32(rows.bias)
    n_positions = 0
    fitted_on = None
    held_out = None
    metric = None
    if states is not None:
        n_positions = len(states)
        fitted_on, held_out = _split(states, next_ids)
        metric = logit_metric(fitted_on)
    token_ids = yield from cluster_rows(
        weight,
        options.cluster_size,
        seed=options.seed,
        metric=metric,
        passes=_n_passes(options),
        checkpoint=checkpoint,
    )
    centroids = yield from fit_centroids(
        weight, token_ids, fitted_on, head_bias=bias, checkpoint=checkpoint
    )
    n_clusters = len(token_ids)
    n_probes = options.n_probes or max(1, round(n_clusters * UNCALIBRATED_SHARE))
    unverified_probes = n_probes
    verification = VerificationSettings()
    report = {}
    if held_out is not None:
        nbytes = BytesRead(
            centroids=centroids.routing_bytes,
            probe=rows.nbytes / rows.n_rows * options.cluster_size,
            dense=rows.nbytes,
            body=body_bytes,
        )
        measured = yield from measure_positions(
            held_out.states,
            _product_with(weight, bias),
            token_ids,
            _product_with(as_float32(centroids.matrix.dequantized()), as_float32(centroids.bias)),
            as_float32(centroids.tail_offset),
            measured_probes(n_clusters, nbytes, options.n_probes),
            held_out.next_ids,
            checkpoint=checkpoint,
            source=checksum(token_ids),
        )
        if options.n_probes is None:
            n_probes = choose_verified(measured, nbytes)
            unverified_probes = choose_unverified(measured, options.target_agreement, nbytes)
        verification = verification_settings(measured, n_probes)
        report = make_report(measured, n_probes, nbytes)
        if original is not None and rows.quantized and not original.quantized:
            report["head_bits"] = yield from compare_bits(
                measured,
                n_probes,
                nbytes,
                original,
                rows,
                held_out.states,
                held_out.next_ids,
            )
    config = FlashHeadConfig(
        vocab_size=rows.n_rows,
        n_clusters=n_clusters,
        cluster_size=options.cluster_size,
        n_probes=n_probes,
        unverified_probes=unverified_probes,
        fingerprint=rows.fingerprint,
        eos_token_ids=tuple(sorted(int(i) for i in eos_token_ids if i in range(rows.n_rows))),
        centroid_bits=centroids.matrix.format.bits,
        centroid_group_size=centroids.matrix.group_size,
        calibration={**(calibration or {}), "positions": n_positions, "seed": options.seed},
        report=report,
        verification=verification,
    )
    return FlashHeadIndex(config, token_ids, centroids, Sketch.of(rows))


class _HeldOut(NamedTuple):
    """The positions that the probes are chosen on.

    Attributes:
        states: Hidden states (n, D) float32.
        next_ids: The tokens after them (n,).
    """

    states: np.ndarray
    next_ids: np.ndarray


def _split(states: np.ndarray, next_ids: np.ndarray | None) -> tuple[np.ndarray, _HeldOut | None]:
    """The states that fit clusters and centroids, and the others if tokens follow them.

    Raises:
        ValueError: If the states are too few or not finite.
    """
    if len(states) < MIN_POSITIONS:
        raise ValueError(
            f"{len(states)} calibration positions are too few: give hundreds, or none."
        )
    if not np.isfinite(states).all():
        raise ValueError("The calibration states hold NaN or infinity: check the model.")
    if next_ids is None:
        return states, None
    n_fitted = len(states) - round(HELD_OUT_SHARE * len(states))
    return states[:n_fitted], _HeldOut(states[n_fitted:], next_ids[n_fitted:])


def _product_with(weight: np.ndarray, bias: np.ndarray | None) -> Product:
    """The product of states with rows (R, D) float32, plus a bias (R,)."""

    def product(states: np.ndarray) -> np.ndarray:
        products = states @ weight.T
        if bias is not None:
            products += bias
        return products

    return product


def _n_passes(options: IndexOptions) -> int:
    """The number of the clustering's passes over all rows."""
    if options.quick:
        return QUICK_PASSES
    return PASSES


def index_nbytes(rows: Matrix) -> int:
    """Approximate size of an index, from what is known before the work."""
    # An index has ids of 4 bytes, centroids of 4 bits, and small arrays.
    return rows.n_rows * (4 + rows.hidden_size // 16)


def expected_seconds(rows: Matrix, options: IndexOptions) -> dict[str, float]:
    """The approximate greatest time of an index: the time limit of the text, and the products.

    Args:
        rows: The head's rows (V, D).
        options: How the index is made.

    Returns:
        The time of each stage, by its name, in their order.
    """
    matrix = np.ones((SPEED_SAMPLE, SPEED_SAMPLE), dtype=np.float32)
    seconds_of_sample = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=3))
    n_clusters = -(-rows.n_rows // options.cluster_size)
    seconds_of_pass = rows.n_rows * rows.hidden_size / SPEED_SAMPLE**3 * seconds_of_sample
    clustering = CLUSTER_PASSES * _n_passes(options) * n_clusters * seconds_of_pass
    if options.source == NO_CALIBRATION:
        return {CLUSTERING: clustering}
    seconds = {READING: options.calibration_seconds, CLUSTERING: clustering}
    for stage, passes in POSITION_PASSES.items():
        seconds[stage] = passes * options.positions * seconds_of_pass
    return seconds
