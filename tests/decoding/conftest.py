"""A tiny model whose FlashHead often proposes another token than the dense head's."""

import pytest

from flash_loops import make_flash
from mlx_flashhead.decoding.verification import Verification
from mlx_flashhead.head import same_sums
from mlx_flashhead.head.draws import filters


@pytest.fixture(scope="session")
def flash():
    return make_flash(num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _rows_are_halved(monkeypatch):
    """A draw halves rows of these few tokens, as it does those of a real vocabulary."""
    monkeypatch.setattr(filters, "SORTED", 16)


@pytest.fixture(autouse=True)
def _few_logits_are_enough(monkeypatch):
    """The scored logits of these small vocabularies may be the dense ones, too."""
    monkeypatch.setattr(same_sums, "ENOUGH_LOGITS", 600)


@pytest.fixture
def misses(monkeypatch):
    """The sequences with a rejected proposal: a test without any shows nothing."""
    rejected = []
    accept = Verification.accept

    def counting(self, text):
        accept(self, text)
        if text.rejected:
            rejected.append(text)

    monkeypatch.setattr(Verification, "accept", counting)
    return rejected
