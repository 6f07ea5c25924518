"""What is said once about a model: what it gains here, and what a finer head would give."""

from dataclasses import replace

import mlx.nn as nn
import pytest

from mlx_flashhead.decoding.tuning import Tuning
from mlx_flashhead.loading import tuned
from mlx_flashhead.loading.first_gain import fine_gain, first_gain
from mlx_flashhead.loading.free_head import free_head_gain
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.loading.sources import StoredHead
from mlx_flashhead.loading.tuned import install_stored
from tiny_models import install_index, tiny_index, tiny_model

FAST = Tuning(4, 1e30, 8, 0.07, 1.5, 0.01, 0.0, dense=False)


def with_head(bits):
    model = tiny_model()
    if bits < 32:
        nn.quantize(model, 64, bits)
    install_index(model, tiny_index(model, n_probes=4))
    return model


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_files_with_8_bits_are_the_best_case(bits):
    said = first_gain(with_head(bits), FAST)
    assert said.startswith("FlashHead makes this model 1.50 times as fast here. ")
    if bits == 4:
        assert "with `fine_head` its text gets better" in said
    else:
        assert f"has {bits} bits already, the best case: it needs no `fine_head`" in said
        assert first_gain(with_head(bits), replace(FAST, dense=True)) == ""


def test_a_finer_head_costs_what_its_probes_read():
    model, most = with_head(4), Tuning(10**6, 1e30, 8, 0.07, 1.0, 0.01, 0.0, dense=True)
    whole = 1 + (1 - 1 / free_head_gain(model)) * (8.5 / 4.5 - 1)
    assert fine_gain(model, most) == pytest.approx(1 / whole)  # all clusters: as a dense head
    assert 1 / whole < fine_gain(model, replace(most, n_probes=4)) < 1
    assert fine_gain(model, replace(most, n_probes=4, gain=1.5)) < 1.5


def test_doubts_are_said_and_what_is_not_known_is_not():
    model = with_head(4)
    doubtful = replace(FAST, predicted=True, provisional=True)
    assert "should make this model 1.50 times as fast here (provisional)" in first_gain(
        model, doubtful
    )
    assert first_gain(model, replace(FAST, gain=None)) == ""
    assert first_gain(model, FAST, finer=True).endswith("It has a finer head of 4 bits.")


def test_it_is_one_line_at_the_first_load(monkeypatch):
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    monkeypatch.setattr(tuned, "is_busy", lambda: False)

    def tune(*_):
        yield
        return FAST

    monkeypatch.setattr(tuned, "tune", tune)
    lines = []
    for _ in range(2):
        model, options = tiny_model(), HeadOptions()
        object.__setattr__(options, "say", lines.append)
        install_stored(model, StoredHead(tiny_index(model, n_probes=4), "here"), options)
    assert [line for line in lines if line != tuned.MEASURING] == [first_gain(model, FAST)]
