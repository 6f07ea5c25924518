"""Puts a stored FlashHead on a model, with the settings for this machine."""

from collections.abc import Iterator

import mlx.nn as nn

from ..common.bars import Bar
from ..decoding.measuring.rehearsal import rehearse
from ..decoding.measuring.tuning import LEAST_MEASUREMENTS
from ..decoding.policy import policy_of
from ..head.flash_head import FlashHead
from ..head.operations import Risk
from ..models.install import hidden_dtype, install
from ..models.locate import HeadLocation, find_head
from ..models.logit_maps import logit_map_of
from .head_options import HeadOptions
from .sources import StoredHead
from .tuned import tune_head

MEASURING = "Measuring its speed on this machine …"
END = object()


def install_stored(
    model: nn.Module, stored: StoredHead, options: HeadOptions, location: HeadLocation | None = None
) -> FlashHead:
    """Puts a stored FlashHead on a dense model, with the settings for this machine.

    Args:
        model: The model.
        stored: The FlashHead.
        options: How the model gets it, and where it is said what is done.
        location: The model's head; None: it is found.

    Returns:
        The FlashHead on the model.

    Raises:
        ValueError: If it does not fit, or an option is not valid.
    """
    index = stored.index
    if location is None:
        location = find_head(model)
    near = index.check_fit(location.rows(), stored.source)
    if near is not None:
        options.say(near)
    config = index.config
    n_probes = options.n_probes
    unverified_probes = None
    if n_probes is None and options.drafts:
        n_probes = config.draft_probes
    elif n_probes is None:
        n_probes = config.n_probes
        unverified_probes = config.unverified_probes
    head = install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=n_probes,
        unverified_probes=unverified_probes,
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
    _measure(tune_head(model, index, options), options)
    return head


def _measure(measurements: Iterator[None], options: HeadOptions) -> None:
    """Takes measurements, and shows how far they are; nothing where there are none."""
    if next(measurements, END) is END:
        return
    options.say(MEASURING)
    with Bar("Measuring", LEAST_MEASUREMENTS, disable=not options.progress, leave=False) as bar:
        bar.update()
        for _ in measurements:
            # Turns that disagree are followed by others.
            bar.total = max(bar.total, bar.n + 1)
            bar.update()
