"""What is said once about a model: what it gains here, and what a finer head would give."""

from dataclasses import replace

import mlx.nn as nn
import pytest

from mlx_flashhead import get_flash_head
from mlx_flashhead.decoding import policy
from mlx_flashhead.decoding.measuring import tuning
from mlx_flashhead.decoding.policy import Tuning, policy_of
from mlx_flashhead.loading.estimated_gain import fine_gain, free_head_gain
from mlx_flashhead.loading.gain_sentences import first_gain
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.loading.installing import install_stored
from mlx_flashhead.loading.sources import StoredHead
from tiny_models import install_index, tiny_index, tiny_model

FAST = Tuning(gain=1.5, sampled_gain=1.5, dense_seconds=0.01)


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
        assert first_gain(with_head(bits), replace(FAST, gain=0.9)) == ""


def test_a_finer_head_costs_what_its_probes_read():
    model = with_head(4)
    head = get_flash_head(model)
    as_dense = replace(FAST, gain=1.0)
    whole = 1 + (1 - 1 / free_head_gain(model)) * (8.5 / 4.5 - 1)
    assert 1 / whole < fine_gain(model, as_dense) < 1
    assert fine_gain(model, FAST) < 1.5
    # It scores all clusters, as a dense head does.
    head.n_probes = head.n_clusters
    assert fine_gain(model, as_dense) == pytest.approx(1 / whole)


def test_a_finer_head_is_said():
    model = with_head(4)
    assert first_gain(model, FAST, finer=True).endswith("It has a finer head of 4 bits.")


def test_it_is_one_line_at_the_first_load(monkeypatch, capsys):
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "AGREEMENT", 1e9)
    monkeypatch.setattr(tuning, "MAX_PENDING", 4)
    monkeypatch.setattr(policy, "least_gain", lambda: 0.0)
    heads = []
    for _ in range(2):
        model = tiny_model()
        stored = StoredHead(tiny_index(model, n_probes=4), "here")
        heads.append(install_stored(model, stored, HeadOptions()))
    gain = policy_of(heads[0]).tuning.gain
    said = capsys.readouterr().err.splitlines()
    found = [line for line in said if "times as fast" in line]
    assert len(found) == 1
    assert found[0].startswith(f"FlashHead makes this model {gain:.2f} times as fast here")
    assert found[0].endswith("the best case: it needs no `fine_head`.")
