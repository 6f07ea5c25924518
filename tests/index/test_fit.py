"""An index and the rows of a model: its own, near ones, others."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.models.locate import find_head
from tiny_models import tiny_index, tiny_model


@pytest.fixture(scope="module")
def index():
    return tiny_index(tiny_model(tied=False, vocab_size=300))


@pytest.fixture(scope="module")
def rows():
    return find_head(tiny_model(tied=False, vocab_size=300)).rows()


def noisy(rows, share):
    deviation = float(rows.weight.std())
    noise = np.random.default_rng(0).normal(scale=deviation, size=rows.weight.shape)
    return Matrix(rows.weight + share * mx.array(noise.astype(np.float32)))


def test_its_own_rows_are_taken_silently_and_near_ones_with_a_sentence(index, rows):
    assert index.check_fit(rows, "here") is None
    for near in (
        Matrix(rows.weight.astype(mx.bfloat16)),
        rows.quantize(bits=8, group_size=64),
        rows.quantize(bits=4, group_size=32, mode="mxfp4"),
        noisy(rows, 0.1),
    ):
        said = "The FlashHead in here was made from another form of these rows [(].*[.]"
        assert re.fullmatch(said, index.check_fit(near, "here"))


def test_other_rows_and_shapes_are_refused(index, rows):
    other = r"here belongs to other rows .*cosine.*one is found"
    for wrong, said in (
        (noisy(rows, 0.5), other),
        (Matrix(rows.weight[::-1]), other),
        (Matrix(rows.weight * 1.2), other),
        (rows.quantize(bits=2, group_size=64), other),
        (Matrix(rows.weight[1:]), "for 300 tokens of width 64, but the model has 299 of"),
        (Matrix(rows.weight[:, :32]), "has 300 of width 32"),
    ):
        with pytest.raises(ValueError, match=said):
            index.check_fit(wrong, "here")
