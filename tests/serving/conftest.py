"""Tiny models for the server's tests."""

import time

import pytest

import mlx_flashhead
from chain_models import write_chain_model
from engines import running
from mlx_flashhead.serving.catalogue import Catalogue
from mlx_flashhead.serving.engine import prefill
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


@pytest.fixture
def start(random_model):
    """A function that starts engines of the random model: (flags) → engine."""
    engines = []

    def start(*arguments, **options):
        def load():
            return Catalogue([served_model(random_model / "flash", **options)])

        engines.append(running(load, *arguments))
        return engines[-1]

    yield start
    for engine in engines:
        assert engine.close(20)


@pytest.fixture(scope="session")
def flash(random_model):
    """``(model, tokenizer)`` of the random model, in this process."""
    return mlx_flashhead.load(str(random_model / "flash"))


@pytest.fixture(scope="module")
def drafting(random_model):
    """An engine whose model drafts for itself."""

    def load():
        served = served_model(random_model / "flash")
        served.draft_model, _ = mlx_flashhead.load(str(random_model / "flash"))
        served.batchable = False
        return Catalogue([served])

    engine = running(load)
    yield engine
    assert engine.close(20)


@pytest.fixture
def chunks(monkeypatch):
    """(thread-safe) list of the chunks that are read, each of which takes a moment."""
    read = []
    compute = prefill.Reading._compute

    def slow(self, tokens):
        read.append((self.job, tokens.size))
        time.sleep(0.02)
        compute(self, tokens)

    monkeypatch.setattr(prefill.Reading, "_compute", slow)
    return read
