"""A tiny model whose FlashHead often proposes another token than the dense head's."""

import pytest

from flash_loops import make_flash
from mlx_flashhead.head import draw
from mlx_flashhead.lossless.verify import Check


@pytest.fixture(scope="session")
def flash():
    return make_flash(num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _rows_are_halved(monkeypatch):
    """A draw halves rows of these few tokens, as it does those of a real vocabulary."""
    monkeypatch.setattr(draw, "SORTED", 16)


@pytest.fixture
def misses(monkeypatch):
    """The positions at which a check chose another token: a test without any shows nothing."""
    found = []
    settle = Check._settle

    def counting(self, text, position):
        settle(self, text, position)
        if text.refused:
            found.append(position)

    monkeypatch.setattr(Check, "_settle", counting)
    return found
