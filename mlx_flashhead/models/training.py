"""Whether a model is being trained, so that it draws numbers of its own."""

from typing import Any

import mlx.nn as nn

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def may_drop_out(model: Any) -> bool:
    """Whether a call of a model may draw from MLX's random state: in training mode, with dropout.

    A dropout of no values counts, too: nothing but speed is lost where its text is decoded so.
    """
    if not isinstance(model, nn.Module) or not model.training:
        return False
    return any(isinstance(part, DROPOUTS) and part.training for part in model.modules())
