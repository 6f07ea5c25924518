"""Makes the index of a model in short steps, between which the model is free for other work.

Reading the text, clustering, fitting and measuring all advance step by step. Nothing is written, so
a build that is dropped or killed leaves nothing behind.

The recipe of a build at first use is ``IndexOptions(quick=True)``: a third of the positions
(`options.py`), and a third of the passes (`clustering.py`). docs/how-it-works.md has what it costs.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.matrix import Matrix
from ..index.files import FlashHeadIndex
from ..index.settings import FlashHeadConfig
from ..models.locate import HeadLocation
from .calibration import given_states, text_states
from .clustering import PASSES, QUICK_PASSES
from .indexing import build_index
from .options import GIVEN, MIN_POSITIONS, IndexOptions
from .probes import Goals
from .steps import Steps, Stopwatch, stepwise

STEP_SECONDS = 0.1  # of the device, where a window of text takes no longer


@stepwise
def model_index(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    options: IndexOptions,
    *,
    text: str | None = None,
    drafted: Steps[np.ndarray] | None = None,
    recipe: dict[str, Any] | None = None,
    step_seconds: float = math.inf,
) -> Steps[FlashHeadIndex]:
    """The index of a model. Between two steps the model is as it was, and may write text.

    The model runs in the steps of the text alone. The others are numpy's, or MLX's on a GPU.

    Args:
        model: A dense model of mlx-lm or mlx-vlm.
        text: Text of the file to calibrate on, if the options name one.
        drafted: Steps that give a drafter's states, instead of text.
        recipe: The recipe to store.
        step_seconds: Time that a step of the model may take, if a window of text takes no longer.

    Raises:
        ValueError: At a step, if the text is too short or an option does not fit the model.
    """
    states = next_ids = None
    calibration = {"source": options.source} | ({"quick": True} if options.quick else {})
    if drafted is not None:
        states = yield from drafted
        calibration["source"] = "drafts"
    elif text is not None:
        states, next_ids = yield from text_states.steps(
            model,
            tokenizer,
            location,
            text,
            positions=options.positions,
            step_seconds=step_seconds,
        )
        if len(states) < MIN_POSITIONS:
            raise ValueError(
                f"{options.calibration} has only {len(states)} positions to calibrate on: give a "
                "text of some pages."
            )
    elif options.source == GIVEN:
        limit = Stopwatch(options.calibration_seconds)
        states, next_ids = yield from given_states.steps(
            model,
            tokenizer,
            location,
            options.positions,
            limit=limit,
            step_seconds=step_seconds,
        )
        if limit.cut_short:
            calibration["cut_short"] = True
    return (
        yield from build_index.steps(
            location.rows(),
            states,
            next_ids,
            cluster_size=options.cluster_size,
            n_probes=options.n_probes,
            goals=Goals(options.target_agreement, options.target_kl),
            eos_token_ids=tuple(tokenizer.eos_token_ids),
            calibration=calibration,
            passes=QUICK_PASSES if options.quick else PASSES,
            seed=options.seed,
            body_bytes=_body_bytes(model, location),
            recipe=recipe,
        )
    )


def cut_short(config: FlashHeadConfig) -> list[str]:
    """A sentence on a build that the time limit cut short; none on others."""
    if not config.calibration.get("cut_short"):
        return []
    return [
        f"The text was cut short by the time limit, after {config.calibration['positions']:,} "
        "positions: a build on a quiet machine, or with more calibration_seconds, is faster per "
        "token."
    ]


def index_nbytes(rows: Matrix) -> int:
    """Approximate size of an index, from what is known before the work."""
    return rows.n_rows * (4 + rows.hidden_size // 16)  # ids, centroids of 4 bits and small arrays


def _body_bytes(model: nn.Module, location: HeadLocation) -> int:
    """Bytes of all weights without the head and the embeddings, of which a token reads one row."""
    return sum(
        array.nbytes
        for module in model.modules()
        if module is not location.module
        and not isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        for array in module.values()
        if isinstance(array, mx.array)
    )
