"""The evaluation of a model with a FlashHead, against its own logits."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.benchmarks.agreement import bytes_read, measure_agreement
from mlx_flashhead.models.install import get_flash_head
from model_folders import VOCAB_SIZE
from tiny_models import install_index, tiny_index, tiny_model

TEXT = "Sphinx of black quartz, judge my vow. The five boxing wizards jump quickly. " * 2


@pytest.fixture(scope="module")
def tokenizer(dense):
    return mlx_lm.load(str(dense))[1]


def installed_model(arch="llama", *, n_probes=5, hidden_size=64, eos_token_ids=(), **options):
    """A model with a FlashHead of random clusters of 8, which does not divide V."""
    model = tiny_model(arch, vocab_size=VOCAB_SIZE, hidden_size=hidden_size, **options)
    index = tiny_index(model, n_probes=n_probes, eos_token_ids=eos_token_ids)
    install_index(model, index, unverified_probes=n_probes, backend="mlx")
    return model


def rows_by(evaluation):
    return {row["n_probes"]: row for row in evaluation["rows"]}


def perplexity(logits, next_ids):
    losses = nn.losses.cross_entropy(mx.array(logits), mx.array(next_ids))
    return np.exp(losses.mean().item())


@pytest.mark.parametrize("kwargs", [{"bits": 8}, {"arch": "qwen3", "hidden_size": 48}])
def test_measures_are_those_of_the_model_s_logits(tokenizer, kwargs):
    """The head is at the end of these architectures, so that the model's logits are its own."""
    model = installed_model(**kwargs)
    head = get_flash_head(model)
    token_ids = np.array(tokenizer.encode(TEXT))
    tokens = mx.array(token_ids[None, :-1])
    next_ids = token_ids[1:]
    found = measure_agreement(model, tokenizer, TEXT, probe_counts=[5, 2])
    dense = np.array(model(tokens)[0])
    assert found["positions"] == len(next_ids)
    assert found["dense_perplexity"] == pytest.approx(perplexity(dense, next_ids), rel=1e-3)
    for n_probes in (2, 5):
        with head.settings(n_probes=n_probes):
            logits = np.array(model(tokens)[0])
        measured = rows_by(found)[n_probes]
        agreement = (logits.argmax(axis=1) == dense.argmax(axis=1)).mean()
        assert measured["agreement"] == pytest.approx(agreement, abs=1e-9)
        assert measured["perplexity"] == pytest.approx(perplexity(logits, next_ids), rel=1e-3)


def test_eos_clusters_are_among_the_probes(tokenizer):
    """As they are in the head: every state's first probe is taken by the EOS token's cluster."""
    model = installed_model(eos_token_ids=(1,))
    found = rows_by(measure_agreement(model, tokenizer, TEXT, probe_counts=[1]))
    held = np.array(get_flash_head(model).clustered.token_ids)
    (own,) = [ids for ids in held if 1 in ids]
    token_ids = np.array(tokenizer.encode(TEXT))
    covered = np.isin(token_ids[1:], own).mean()
    assert found[1]["coverage"] == pytest.approx(covered)


def test_default_probes_and_the_model_s_own(tokenizer):
    model = installed_model(n_probes=7)
    # The usual ones exceed C.
    for counts, expected in ((None, [7]), ([9, 3, 9], [3, 9])):
        found = measure_agreement(model, tokenizer, TEXT, positions=20, probe_counts=counts)
        assert (found["n_probes"], found["positions"], [*rows_by(found)]) == (7, 20, expected)
    assert get_flash_head(model).unverified_probes == 7


@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_by_hand(bits):
    """Stage 1 and p clusters of 8 rows, relative to V rows."""
    head = get_flash_head(installed_model(bits=bits, tied=False))
    # A row is floats, or bytes, scales and offsets.
    if bits is None:
        row = 64 * 4
    else:
        row = 64 + 2 * 2 * 4
    # A centroid has 4-bit weights, two 16-bit scales and offsets, and the bias.
    centroid = 64 // 2 + 2 * 2 * 2 + 4
    for n_probes in (1, 10, 33):
        expected = (33 * centroid + n_probes * 8 * row) / (VOCAB_SIZE * row)
        assert bytes_read(head).share(n_probes) == pytest.approx(expected)
