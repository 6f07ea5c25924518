"""A tiny model in both forms, for the tests of what a model does with a FlashHead."""

import pytest

from model_pair import make_pair


@pytest.fixture(scope="session", params=["tied", "untied"])
def shared_pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


@pytest.fixture
def pair(shared_pair):
    """Two forms of a model; settings of its head that a test changes last as long as the test."""
    before = shared_pair.head.n_probes
    yield shared_pair
    shared_pair.head.n_probes = before
