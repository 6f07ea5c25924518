"""What the tests of FlashHeads apart from their models share."""

from functools import partial

import pytest

from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import background as build


@pytest.fixture
def quick(monkeypatch):
    """A build takes a second."""
    monkeypatch.setattr(build, "IndexOptions", partial(IndexOptions, calibration_positions=100))
