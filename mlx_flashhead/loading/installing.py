"""Puts a stored FlashHead on a model, with the settings for this machine."""

import mlx.nn as nn

from ..decoding.measuring.rehearsal import rehearse
from ..decoding.policy import policy_of
from ..head.flash_head import FlashHead
from ..head.steps import Risk
from ..models.install import hidden_dtype, install
from ..models.locate import HeadLocation, find_head
from ..models.logit_maps import logit_map_of
from .head_options import HeadOptions
from .sources import StoredHead
from .tuned import tune_head

MEASURING = "Measuring its speed on this machine …"


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
    for step, _ in enumerate(tune_head(model, index, options)):
        # There is more to come than the first step.
        if step == 0:
            options.say(MEASURING)
    return head
