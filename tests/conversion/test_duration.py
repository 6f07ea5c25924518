"""How long a build should take: with the text's time limit, and growing with the head."""

import mlx.core as mx
import pytest

from mlx_flashhead.conversion import duration
from mlx_flashhead.conversion.duration import expected_seconds, in_words
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.head.matrix import Matrix


def test_it_grows_with_the_head_and_the_text(monkeypatch):
    monkeypatch.setattr(duration, "_operations_per_second", lambda: 1e9)

    def expected(vocab_size, **options):
        rows = Matrix(mx.zeros((vocab_size, 64)))
        return expected_seconds(rows, IndexOptions(calibration_seconds=30, **options)) - 30

    assert 0 < expected(1000) < expected(2000) / 1.9
    assert expected(1000, calibration_positions=100) < expected(1000)


@pytest.mark.parametrize(
    "seconds, words", [(1, "a minute"), (60, "a minute"), (61, "2 minutes"), (400, "7 minutes")]
)
def test_in_words(seconds, words):
    assert in_words(seconds) == words
