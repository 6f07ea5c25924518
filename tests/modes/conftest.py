"""A tiny model in both forms for each mode's tests."""

import pytest

from model_pair import make_pair


@pytest.fixture(scope="session", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    """Two forms of a model; its head's settings are put back after each test by ``head``."""
    return make_pair(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


@pytest.fixture(autouse=True)
def head(pair):
    """The FlashHead of ``pair``; settings that a test changes last as long as the test."""
    head = pair.head
    before = head.n_probes, head.max_positions
    yield head
    head.n_probes, head.max_positions = before


@pytest.fixture
def exact(head):
    """Every cluster is probed, in this test."""
    head.n_probes = head.n_clusters
    return head
