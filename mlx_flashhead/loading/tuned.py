"""What a FlashHead gains on this machine: stored beside the FlashHeads, and said.

What a busy machine has measured decides nothing: the model stays dense until it is quiet.
"""

import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..common.machine import is_busy
from ..common.stored import store, stored
from ..decoding.measuring.rehearsal import rehearse
from ..decoding.measuring.tuning import prepare_wide_steps, tune
from ..decoding.policy import Tuning, least_gain, policy_of
from ..head.backend import device_name
from ..head.flash_head import FlashHead
from ..head.matrix import Matrix
from ..head.steps import Risk
from ..index.flash_head_index import FlashHeadIndex
from ..models.finer_head import DEFAULT_BITS
from ..models.install import hidden_dtype, install, installed_head
from ..models.locate import HeadLocation, find_head
from ..models.logit_maps import logit_map_of
from .head_options import HeadOptions
from .sources import StoredHead, speeds_of

MEASURING = "Measuring its speed on this machine …"
# A token reads one row of these.
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def install_stored(
    model: nn.Module, stored: StoredHead, options: HeadOptions, location: HeadLocation | None = None
) -> FlashHead:
    """Puts a stored FlashHead on a dense model, with the settings for this machine.

    Raises:
        ValueError: If it does not fit, or an option is not valid.
    """
    index = stored.index
    location = location or find_head(model)
    if near := index.check_fit(location.rows(), stored.source):
        options.say(near)
    config = index.config
    n_probes = options.n_probes
    chosen = n_probes is not None or options.drafts
    if n_probes is None:
        n_probes = config.draft_probes if options.drafts else config.n_probes
    head = install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=n_probes,
        unverified_probes=None if chosen else config.unverified_probes,
        risk=Risk.from_settings(config.verification),
        eos_token_ids=config.eos_token_ids,
        backend=options.backend,
        location=location,
    )
    policy_of(head).draft_probes = options.n_probes or config.draft_probes
    if not options.drafts:
        # Nothing is compiled or measured within a text. The logit map has its own kernels.
        logit_map_of(model)
        head.measure_rounding(hidden_dtype(model))
        rehearse(model)
    for step, _ in enumerate(tune_head(model, index, options)):
        # There is more to come than the first step.
        if step == 0:
            options.say(MEASURING)
    return head


def tune_head(
    model: nn.Module, index: FlashHeadIndex, options: HeadOptions
) -> Generator[None, None, Tuning | None]:
    """Has the loops go by what the FlashHead of ``model`` gains on this machine, in steps.

    It is measured once, and again while only a busy machine has measured it. Nothing is measured
    for probes that the user has chosen, and with ``$MLX_FLASHHEAD_TUNING=off``.
    """
    off = os.environ.get("MLX_FLASHHEAD_TUNING") == "off"
    if options.n_probes is not None or options.drafts or not options.tunes or off:
        return None
    head = installed_head(model)
    place = speeds_of(index.config)
    key = _conditions(model, head)
    known = read(place)
    if not known and place.exists():
        options.say(f"{place} is damaged or of another version: its speeds are measured again.")
    before = known.get(key)
    if before is not None and not options.measures and (is_busy() or not before.busy):
        tuning = before
    else:
        tuning = yield from tune(model, _rejected(index, head.n_probes))
        store(place, known | {key: tuning})
        said = []
        if tuning.dense and not options.always:
            said.append(_why_dense(tuning))
        if (before is None or before.busy) and not tuning.busy:
            gain = first_gain(model, tuning, finer=bool(options.fine_head))
            if gain:
                said.append(gain)
        if said:
            options.say(" ".join(said))
    apply_tuning(model, tuning, options)
    return tuning


def apply_tuning(model: nn.Module, tuning: Tuning, options: HeadOptions) -> None:
    """Has the loops go by what was measured."""
    policy_of(installed_head(model)).take(tuning, always=options.always)
    prepare_wide_steps(model)


def _rejected(index: FlashHeadIndex, n_probes: int) -> tuple[float, float]:
    """The shares of greedy and sampled proposals that were rejected in the text of its making."""
    for row in index.config.verification.get("by_probes", ()):
        if row["n_probes"] == n_probes:
            return row["greedy_differs"], row["sampled_differs"]
    return 0.0, 0.0


def _conditions(model: nn.Module, head: FlashHead) -> str:
    """What the times depend on, in words: the machine, the backend, MLX and the formats."""
    dtype = str(hidden_dtype(model)).removeprefix("mlx.core.")
    form = f"{head.clustered.rows.format} rows, {dtype}"
    return f"{device_name()}, {head.backend}, mlx {version('mlx')}, {form}"


def read(place: Path) -> dict[str, Tuning]:
    """What was measured, by machine; nothing where the file is not there, or damaged."""
    return stored(place, Tuning)


def _why_dense(tuning: Tuning) -> str:
    """Says that a model stays dense: its FlashHead gains less than is needed."""
    if tuning.busy:
        return (
            "The machine is too busy to measure what FlashHead gains here: the model stays dense "
            "until it is quieter. `flash_head_always=True` overrides it."
        )
    return (
        f"FlashHead would not make this model faster on this machine ({tuning.gain:.2f} x, and at "
        f"least {least_gain():g} x is needed): it stays dense. "
        "`flash_head_always=True` overrides it."
    )


def speed_text(tuning: Tuning | None) -> str:
    """A gain, and whether the model stays dense for it, such as "1.02 x (dense)"."""
    if tuning is None:
        return "not known yet"
    if tuning.busy:
        return "not known yet (dense, since the machine was busy)"
    speed = f"{tuning.gain:.2f} x"
    if tuning.dense:
        speed += " (dense)"
    return speed


def first_gain(model: nn.Module, tuning: Tuning, *, finer: bool = False) -> str:
    """Says how many times as fast a model is with FlashHead, and with ``fine_head``.

    Args:
        model: A model with an installed FlashHead.
        tuning: What was measured on this machine.
        finer: Whether the head is a finer one already.

    Returns:
        One or two sentences for one line; nothing that is said elsewhere, with figures.
    """
    rows = installed_head(model).clustered.rows
    advice = _advice(model, rows, tuning, finer)
    if tuning.dense:
        return advice
    gain = f"FlashHead makes this model {tuning.gain:.2f} times as fast here"
    return f"{gain}. {advice}".strip()


def _advice(model: nn.Module, rows: Matrix, tuning: Tuning, finer: bool) -> str:
    """What the bits of the head mean for the gain."""
    bits = rows.bits if rows.quantized else 8 * rows.weight.itemsize
    if finer:
        return f"It has a finer head of {bits} bits."
    if bits >= DEFAULT_BITS:
        best = f"Its head has {bits} bits already, the best case: it needs no `fine_head`."
        return "" if tuning.dense else best
    speed = fine_gain(model, tuning)
    return (
        f"Its head has {bits} bits: with `fine_head` its text gets better, at an estimated "
        f"{speed:.2f} times the speed of the normal head."
    )


def fine_gain(model: nn.Module, tuning: Tuning) -> float:
    """Estimates the speed with a head of 8 bits and FlashHead, relative to the head as it is.

    FlashHead reads the probed share of more bytes. Its verification is bound by arithmetic, which
    the bits do not change (docs/finer-head.md). A model that stays dense would use FlashHead then.
    """
    head = installed_head(model)
    rows = head.clustered.rows
    free = free_head_gain(model)
    # The head's share of a dense token's time, by bytes.
    head_share = 1 - 1 / free
    # Scales and biases take half a bit.
    more = (DEFAULT_BITS + 0.5) / (rows.bits + 0.5) - 1
    probed = head.n_probes / head.n_clusters
    return 1 / (1 / tuning.gain + head_share * probed * more)


def free_head_gain(model: nn.Module) -> float:
    """Estimates tokens per second with a head that takes no time, relative to dense decoding.

    A token takes as long as the weights that it reads. The estimate is high: of experts it counts
    one, and it leaves the cache out.

    Args:
        model: A model with an installed FlashHead.

    Returns:
        The ratio, 1 or more.
    """
    head_bytes = sum(
        array.nbytes for array in installed_head(model).clustered.rows.arrays().values()
    )
    body_bytes = sum(_bytes_read(module) for module in model.modules())
    return (body_bytes + head_bytes) / max(body_bytes, 1)


def _bytes_read(module: nn.Module) -> float:
    """Bytes of a module's own arrays that a token reads, without the head's."""
    if isinstance(module, _EMBEDDINGS) or hasattr(module, "_flash_head"):
        return 0
    nbytes = 0.0
    for array in dict.values(module):
        if not isinstance(array, mx.array):
            continue
        # Experts are matrices in one array of three dimensions.
        n_matrices = len(array) if array.ndim == 3 else 1
        nbytes += array.nbytes / n_matrices
    return nbytes
