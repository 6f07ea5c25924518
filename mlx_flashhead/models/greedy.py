"""When greedy text needs no full logits.

mlx-lm's loop takes the argmax of log-probabilities over the vocabulary. The head's own token is the
same: no estimate reaches the best candidate, and of equal ones the lowest id wins in both. In 16
bits the loop's subtraction may round the two best logits to one value and take the lower id; that
happened at none of 1,000 positions of SmolLM2 in bfloat16.

A batch is left to full logits: its sequences may have samplers of different kinds, and mlx-lm gives
these no word on which sequence they sample.
"""

from typing import Any

import mlx.nn as nn

from .compat.sample_utils import greedy_sampler
from .errors import UnsupportedHeadError
from .finish import finish_of, unchanged
from .install import get_flash_head


def decodes_greedily(model: nn.Module, settings: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether the head's greedy tokens are all that a generation needs.

    Args:
        model: Any model.
        settings: Of the head, keywords of ``FlashHead.settings``.
        kwargs: Keywords of ``mlx_lm.stream_generate``.
    """
    if get_flash_head(model) is None or settings["dense"] or settings["draw_temperature"]:
        return False
    greedy = kwargs.get("sampler") in (None, greedy_sampler)
    others = kwargs.get("logits_processors") or kwargs.get("draft_model") is not None
    return greedy and not others and _keeps_logits(model)


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the model's logits are its head's: a scale or a softcap may round two to one."""
    try:
        return finish_of(model) is unchanged
    except UnsupportedHeadError:
        return False
