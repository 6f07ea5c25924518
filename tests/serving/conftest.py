"""Tiny models for the server's tests."""

import pytest

import mlx_flashhead
from chain_models import write_chain_model
from model_folders import write_model
from served_models import served_model

CALL = '{"name": "weather", "arguments": {"city": "Rome", "limit": Infinity}}'
WORDS = ("<tool_call>", CALL, "</tool_call>", " one", " two", " three", " four")


def convert(folder, name, **options):
    """Converts ``folder`` / dense into ``folder`` / name."""
    new = folder / name
    options = {"calibration": "none", "progress": False} | options
    mlx_flashhead.convert(str(folder / "dense"), str(new), **options)
    return new


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A folder with ``dense`` and ``flash``, a FlashHead of 4 probes."""
    folder = tmp_path_factory.mktemp("random")
    write_model(folder / "dense", tied=False, hidden_size=128)
    convert(folder, "flash", n_probes=4)
    return folder


@pytest.fixture(scope="session")
def chain_model(tmp_path_factory):
    """A checkpoint that calls a tool in a chat, and counts to four after the text "a"."""
    folder = tmp_path_factory.mktemp("chain")
    chains = [" ", *WORDS[:3]], ["a", *WORDS[3:]]
    write_chain_model(folder / "dense", *chains, words=WORDS)
    return convert(folder, "chain", n_probes=2)


@pytest.fixture(scope="session")
def tiny(random_model):
    """The random model as the server has it."""
    return served_model(random_model / "flash")


@pytest.fixture(scope="session")
def chain(chain_model):
    """The counting model as the server has it."""
    return served_model(chain_model)
