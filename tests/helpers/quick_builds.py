"""Builds of FlashHeads that take a second."""

from functools import partial

import pytest

from mlx_flashhead.loading import build_parts


def build_quickly(patch: pytest.MonkeyPatch) -> None:
    """Has builds read few positions, as long as the patch lasts."""
    options = partial(build_parts.IndexOptions, calibration_positions=100)
    patch.setattr(build_parts, "IndexOptions", options)
